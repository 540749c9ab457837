"""What a model host may be told in which state: one table, and nothing else assigns a state."""

from __future__ import annotations

from enum import Enum
from typing import Final

from dumont.errors import FailedPrecondition


class State(Enum):
    """Where a model host is in its life."""

    NEW = "NEW"  # no model yet
    LOADED = "LOADED"  # model in memory and warm, socket closed
    SERVING = "SERVING"  # socket open, calls accepted
    DRAINED = "DRAINED"  # socket open, calls refused, none running
    PAUSED = "PAUSED"  # socket open, calls wait: its GPU may be taken away and given back
    QUIESCED = "QUIESCED"  # nothing open: may be frozen, captured and restored
    AWAKE = "AWAKE"  # new identity after a freeze, socket closed
    STOPPED = "STOPPED"


class Command(Enum):
    """What the control pipe may ask."""

    LOAD = "load"
    SERVE = "serve"
    DRAIN = "drain"
    ACCEPT = "accept"
    PAUSE = "pause"
    CONTINUE = "continue"
    QUIESCE = "quiesce"
    TRIM = "trim"
    ORDER_WEIGHTS = "order_weights"
    WAKE = "wake"
    CANARY = "canary"
    DRAWS = "draws"
    STATUS = "status"
    STOP = "stop"


TABLE: Final[dict[tuple[State, Command], State]] = {
    (State.NEW, Command.LOAD): State.LOADED,
    (State.LOADED, Command.SERVE): State.SERVING,
    (State.LOADED, Command.QUIESCE): State.QUIESCED,
    (State.SERVING, Command.DRAIN): State.DRAINED,
    (State.DRAINED, Command.ACCEPT): State.SERVING,
    (State.DRAINED, Command.QUIESCE): State.QUIESCED,
    (State.SERVING, Command.PAUSE): State.PAUSED,
    (State.PAUSED, Command.ORDER_WEIGHTS): State.PAUSED,
    (State.PAUSED, Command.CONTINUE): State.SERVING,
    # Asked again by a caller whose first request timed out.
    (State.SERVING, Command.ACCEPT): State.SERVING,
    (State.DRAINED, Command.DRAIN): State.DRAINED,
    (State.QUIESCED, Command.TRIM): State.QUIESCED,
    (State.QUIESCED, Command.ORDER_WEIGHTS): State.QUIESCED,
    (State.QUIESCED, Command.WAKE): State.AWAKE,
    (State.AWAKE, Command.SERVE): State.SERVING,
    (State.AWAKE, Command.QUIESCE): State.QUIESCED,
    # A quiesced host has no weights to run a canary with and its generators belong to the snapshot.
    **{
        (state, command): state
        for state in (State.LOADED, State.SERVING, State.DRAINED, State.AWAKE)
        for command in (Command.CANARY, Command.DRAWS)
    },
    **{(state, Command.STATUS): state for state in State if state is not State.STOPPED},
    **{(state, Command.STOP): State.STOPPED for state in State if state is not State.STOPPED},
}


def advance(state: State, command: Command) -> State:
    """The state after ``command`` succeeded in ``state``.

    Raises:
        FailedPrecondition: ILLEGAL_TRANSITION, this command means nothing in this state.
    """
    try:
        return TABLE[state, command]
    except KeyError:
        legal = sorted(known.value for here, known in TABLE if here is state)
        raise FailedPrecondition(
            "ILLEGAL_TRANSITION",
            f"{command.value} is not possible while {state.value}; "
            f"possible now: {', '.join(legal) or 'nothing'}",
            metadata={"state": state.value, "command": command.value},
        ) from None

"""The transitions of an instance as the controller sees it: one table, and nothing else assigns a state.

Commands come from the controller and are refused where they make no sense. Reports come from the
node, which knows the truth, so they are accepted in every state but the last. The inventory settles
the order of the two: while a command is under way, its outcome decides.
"""

from __future__ import annotations

from enum import Enum, auto
from types import MappingProxyType
from typing import Final

from controller.model import InstanceState as State
from dumont.errors import FailedPrecondition


class Event(Enum):
    """What may change an instance's state."""

    # Commands, as they are sent.
    START = auto()
    CAPTURE = auto()
    PARK = auto()
    RESUME = auto()
    MOVE = auto()
    STOP = auto()
    # Outcomes of commands that no report covers.
    CAPTURED = auto()
    REFUSED = auto()
    # Reports of the node.
    SAW_STARTING = auto()
    SAW_SERVING = auto()
    SAW_CAPTURING = auto()
    SAW_PARKING = auto()
    SAW_PARKED = auto()
    SAW_RESUMING = auto()
    SAW_STOPPING = auto()
    SAW_FAILED = auto()
    SAW_GONE = auto()


SAW: Final = MappingProxyType(
    {
        State.STARTING: Event.SAW_STARTING,
        State.SERVING: Event.SAW_SERVING,
        State.CAPTURING: Event.SAW_CAPTURING,
        State.PARKING: Event.SAW_PARKING,
        State.PARKED: Event.SAW_PARKED,
        State.RESUMING: Event.SAW_RESUMING,
        State.STOPPING: Event.SAW_STOPPING,
        State.FAILED: Event.SAW_FAILED,
        State.GONE: Event.SAW_GONE,
    }
)

COMMANDS: Final = {
    (State.UNKNOWN, Event.START): State.STARTING,
    (State.SERVING, Event.CAPTURE): State.CAPTURING,
    (State.SERVING, Event.PARK): State.PARKING,
    (State.PARKED, Event.RESUME): State.RESUMING,
    (State.SERVING, Event.MOVE): State.MOVING,
    (State.STARTING, Event.STOP): State.STOPPING,
    (State.SERVING, Event.STOP): State.STOPPING,
    (State.PARKED, Event.STOP): State.STOPPING,
    (State.FAILED, Event.STOP): State.STOPPING,
}

OUTCOMES: Final = {
    (State.CAPTURING, Event.CAPTURED): State.SERVING,
    (State.FAILED, Event.CAPTURED): State.FAILED,
    (State.STARTING, Event.REFUSED): State.FAILED,
    (State.CAPTURING, Event.REFUSED): State.SERVING,
    (State.PARKING, Event.REFUSED): State.SERVING,
    (State.RESUMING, Event.REFUSED): State.PARKED,
    (State.MOVING, Event.REFUSED): State.SERVING,
    # The instance must go whatever the node answered, so it is stopped again.
    (State.STOPPING, Event.REFUSED): State.FAILED,
    (State.FAILED, Event.REFUSED): State.FAILED,
}

REPORTS: Final = {(old, event): new for new, event in SAW.items() for old in State if old is not State.GONE}

TABLE: Final = MappingProxyType(COMMANDS | OUTCOMES | REPORTS)


class IllegalTransition(FailedPrecondition):
    """The instance's state forbids the command."""

    def __init__(self, instance: str, state: State, event: Event) -> None:
        what = event.name.lower()
        super().__init__(
            "ILLEGAL_TRANSITION",
            f"instances/{instance} is {state.name.lower()}, which does not allow: {what}; "
            f"wait until it has settled or act on another instance",
            metadata={"instance": f"instances/{instance}", "state": state.name, "event": event.name},
        )


def advance(instance: str, state: State, event: Event) -> State:
    """The state after ``event``; ``instance`` is an id, for the message.

    Raises:
        IllegalTransition: the table has no such transition.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalTransition(instance, state, event) from None

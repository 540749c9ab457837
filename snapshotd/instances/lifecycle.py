"""The states of an instance: every transition, in one table. Nothing else decides a state."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from dumont.errors import FailedPrecondition
from snapshotd.model import State


class Event(Enum):
    """What happens to an instance: a request, the end of a job, or the loss of its process."""

    CAPTURE = auto()
    PARK = auto()
    RESUME = auto()
    STOP = auto()
    # The job under way has ended.
    SUCCEEDED = auto()
    FAILED = auto()
    # The process ended by itself.
    LOST = auto()


class IllegalTransition(FailedPrecondition):
    """The event does not fit the state; nothing has changed."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(
            "ILLEGAL_TRANSITION",
            f"an instance that is {state.name} cannot take {event.name}",
            metadata={"state": state.name, "event": event.name},
        )


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.STARTING, Event.SUCCEEDED): State.SERVING,
    (State.STARTING, Event.FAILED): State.FAILED,
    (State.STARTING, Event.LOST): State.FAILED,
    (State.STARTING, Event.STOP): State.STOPPING,
    (State.RESTORING, Event.SUCCEEDED): State.SERVING,
    (State.RESTORING, Event.FAILED): State.FAILED,
    (State.RESTORING, Event.LOST): State.FAILED,
    (State.RESTORING, Event.STOP): State.STOPPING,
    (State.SERVING, Event.CAPTURE): State.CAPTURING,
    (State.SERVING, Event.PARK): State.PARKING,
    (State.SERVING, Event.STOP): State.STOPPING,
    (State.SERVING, Event.LOST): State.FAILED,
    # A capture or park that failed has been undone: the source serves as before.
    (State.CAPTURING, Event.SUCCEEDED): State.SERVING,
    (State.CAPTURING, Event.FAILED): State.SERVING,
    (State.CAPTURING, Event.LOST): State.FAILED,
    (State.CAPTURING, Event.STOP): State.STOPPING,
    (State.PARKING, Event.SUCCEEDED): State.PARKED,
    (State.PARKING, Event.FAILED): State.SERVING,
    (State.PARKING, Event.LOST): State.FAILED,
    (State.PARKING, Event.STOP): State.STOPPING,
    (State.PARKED, Event.RESUME): State.RESUMING,
    (State.PARKED, Event.STOP): State.STOPPING,
    (State.PARKED, Event.LOST): State.FAILED,
    (State.RESUMING, Event.SUCCEEDED): State.SERVING,
    # A process that resumed half-way can neither serve nor be resumed again.
    (State.RESUMING, Event.FAILED): State.FAILED,
    (State.RESUMING, Event.LOST): State.FAILED,
    (State.RESUMING, Event.STOP): State.STOPPING,
    (State.STOPPING, Event.SUCCEEDED): State.GONE,
    # The process ends because snapshotd ends it.
    (State.STOPPING, Event.LOST): State.STOPPING,
    (State.STOPPING, Event.FAILED): State.FAILED,
    (State.FAILED, Event.STOP): State.STOPPING,
}


def advance(state: State, event: Event) -> State:
    """The state to which ``event`` leads from ``state``.

    Raises:
        IllegalTransition: the table has no such transition.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(state, event) from None

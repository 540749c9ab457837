"""Every transition of an instance, in one table. Nothing else decides a state."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, NamedTuple

from dumont.errors import FailedPrecondition
from snapshotd.model import State


class Event(Enum):
    CAPTURE = auto()
    PARK = auto()
    RESUME = auto()
    STOP = auto()
    # What came of the job that a request began.
    SUCCEEDED = auto()
    FAILED = auto()
    # The process ended by itself.
    LOST = auto()


class Job(Enum):
    """Work that a transition begins; its end comes back as an event."""

    CAPTURE = auto()
    PARK = auto()
    RESUME = auto()
    STOP = auto()
    CLEAN_UP = auto()


class Transition(NamedTuple):
    state: State
    job: Job | None = None


class IllegalTransition(FailedPrecondition):
    """The event does not fit the state; nothing changed."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(
            "ILLEGAL_TRANSITION",
            f"an instance that is {state.name} cannot take {event.name}",
            metadata={"state": state.name, "event": event.name},
        )


TRANSITIONS: Final[dict[tuple[State, Event], Transition]] = {
    (State.STARTING, Event.SUCCEEDED): Transition(State.SERVING),
    (State.STARTING, Event.FAILED): Transition(State.FAILED, Job.CLEAN_UP),
    (State.STARTING, Event.LOST): Transition(State.FAILED, Job.CLEAN_UP),
    (State.STARTING, Event.STOP): Transition(State.STOPPING, Job.STOP),
    (State.RESTORING, Event.SUCCEEDED): Transition(State.SERVING),
    (State.RESTORING, Event.FAILED): Transition(State.FAILED, Job.CLEAN_UP),
    (State.RESTORING, Event.LOST): Transition(State.FAILED, Job.CLEAN_UP),
    (State.RESTORING, Event.STOP): Transition(State.STOPPING, Job.STOP),
    (State.SERVING, Event.CAPTURE): Transition(State.CAPTURING, Job.CAPTURE),
    (State.SERVING, Event.PARK): Transition(State.PARKING, Job.PARK),
    (State.SERVING, Event.STOP): Transition(State.STOPPING, Job.STOP),
    (State.SERVING, Event.LOST): Transition(State.FAILED, Job.CLEAN_UP),
    # A capture that failed has unwound: the source serves as before.
    (State.CAPTURING, Event.SUCCEEDED): Transition(State.SERVING),
    (State.CAPTURING, Event.FAILED): Transition(State.SERVING),
    (State.CAPTURING, Event.LOST): Transition(State.FAILED, Job.CLEAN_UP),
    (State.CAPTURING, Event.STOP): Transition(State.STOPPING, Job.STOP),
    (State.PARKING, Event.SUCCEEDED): Transition(State.PARKED),
    (State.PARKING, Event.FAILED): Transition(State.SERVING),
    (State.PARKING, Event.LOST): Transition(State.FAILED, Job.CLEAN_UP),
    (State.PARKING, Event.STOP): Transition(State.STOPPING, Job.STOP),
    (State.PARKED, Event.RESUME): Transition(State.RESUMING, Job.RESUME),
    (State.PARKED, Event.STOP): Transition(State.STOPPING, Job.STOP),
    (State.PARKED, Event.LOST): Transition(State.FAILED, Job.CLEAN_UP),
    (State.RESUMING, Event.SUCCEEDED): Transition(State.SERVING),
    # Half awake is no state to serve from or to try again from.
    (State.RESUMING, Event.FAILED): Transition(State.FAILED, Job.CLEAN_UP),
    (State.RESUMING, Event.LOST): Transition(State.FAILED, Job.CLEAN_UP),
    (State.RESUMING, Event.STOP): Transition(State.STOPPING, Job.STOP),
    (State.STOPPING, Event.SUCCEEDED): Transition(State.GONE),
    # Its process ends because we end it.
    (State.STOPPING, Event.LOST): Transition(State.STOPPING),
    (State.STOPPING, Event.FAILED): Transition(State.FAILED),
    (State.FAILED, Event.STOP): Transition(State.STOPPING, Job.STOP),
}


def advance(state: State, event: Event) -> Transition:
    """The step that ``event`` makes from ``state``.

    Raises:
        IllegalTransition: the table has none.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(state, event) from None

"""The whole matrix of an instance's states and events."""

from __future__ import annotations

import itertools

import pytest

from controller.lifecycle import COMMANDS, OUTCOMES, SAW, TABLE, Event, IllegalTransition, advance
from controller.model import InstanceState as State

REPORTS = set(SAW.values())
LEGAL_COMMANDS = {
    Event.START: {State.UNKNOWN: State.STARTING},
    Event.CAPTURE: {State.SERVING: State.CAPTURING},
    Event.PARK: {State.SERVING: State.PARKING},
    Event.RESUME: {State.PARKED: State.RESUMING},
    Event.MOVE: {State.SERVING: State.MOVING},
    Event.STOP: dict.fromkeys((State.STARTING, State.SERVING, State.PARKED, State.FAILED), State.STOPPING),
    Event.CAPTURED: {State.CAPTURING: State.SERVING, State.FAILED: State.FAILED},
    Event.REFUSED: {
        State.STARTING: State.FAILED,
        State.CAPTURING: State.SERVING,
        State.PARKING: State.SERVING,
        State.RESUMING: State.PARKED,
        State.MOVING: State.SERVING,
        State.STOPPING: State.FAILED,
        State.FAILED: State.FAILED,
    },
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_either_moves_as_written_or_is_refused(state: State, event: Event) -> None:
    if event in REPORTS:
        expected = None if state is State.GONE else next(new for new, saw in SAW.items() if saw is event)
    else:
        expected = LEGAL_COMMANDS[event].get(state)
    if expected is None:
        with pytest.raises(IllegalTransition) as refusal:
            advance("qa-1", state, event)
        assert refusal.value.reason == "ILLEGAL_TRANSITION"
        assert refusal.value.metadata == {
            "instance": "instances/qa-1",
            "state": state.name,
            "event": event.name,
        }
    else:
        assert advance("qa-1", state, event) is expected


def test_the_table_has_no_pair_that_two_parts_decide() -> None:
    assert not COMMANDS.keys() & OUTCOMES.keys()
    assert not any(event in REPORTS for _, event in COMMANDS.keys() | OUTCOMES.keys())
    assert not any(state is State.GONE for state, _ in TABLE)

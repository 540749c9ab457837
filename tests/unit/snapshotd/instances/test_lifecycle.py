"""An instance moves only as the table says."""

from __future__ import annotations

import itertools

import pytest

from snapshotd.instances.lifecycle import TRANSITIONS, Event, IllegalTransition, advance
from snapshotd.model import State

PAIRS = list(itertools.product(State, Event))
LIVING = set(State) - {State.FAILED, State.GONE}


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda value: value.name)
def test_every_pair_is_either_in_the_table_or_refused(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert advance(state, event) is TRANSITIONS[state, event]
        return
    with pytest.raises(IllegalTransition) as refusal:
        advance(state, event)
    assert refusal.value.reason == "ILLEGAL_TRANSITION"
    assert refusal.value.metadata == {"state": state.name, "event": event.name}


def test_everything_but_what_is_ending_or_gone_can_be_stopped() -> None:
    stoppable = {state for state, event in TRANSITIONS if event is Event.STOP}
    assert stoppable == set(State) - {State.STOPPING, State.GONE}


def test_a_lost_process_ends_every_life() -> None:
    for state in LIVING - {State.STOPPING}:
        assert advance(state, Event.LOST) is State.FAILED


def test_a_failed_capture_or_park_leaves_the_source_serving() -> None:
    assert advance(State.CAPTURING, Event.FAILED) is State.SERVING
    assert advance(State.PARKING, Event.FAILED) is State.SERVING


def test_a_failed_start_restore_or_resume_fails_the_instance() -> None:
    for state in (State.STARTING, State.RESTORING, State.RESUMING):
        assert advance(state, Event.FAILED) is State.FAILED


def test_nothing_leaves_gone() -> None:
    assert not [event for state, event in TRANSITIONS if state is State.GONE]


def test_every_state_but_the_first_can_be_reached() -> None:
    reached = {State.STARTING, State.RESTORING} | set(TRANSITIONS.values())
    assert reached == set(State)

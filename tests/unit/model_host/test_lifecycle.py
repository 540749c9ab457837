"""A model host's states and commands: the whole matrix, legal and illegal."""

from __future__ import annotations

import pytest

from dumont.errors import FailedPrecondition
from model_host.lifecycle import Command, State, advance

LIFE = {
    State.NEW: {Command.LOAD: State.LOADED},
    State.LOADED: {Command.SERVE: State.SERVING, Command.QUIESCE: State.QUIESCED},
    State.SERVING: {
        Command.DRAIN: State.DRAINED,
        Command.ACCEPT: State.SERVING,
        Command.PAUSE: State.PAUSED,
    },
    State.PAUSED: {Command.ORDER_WEIGHTS: State.PAUSED, Command.CONTINUE: State.SERVING},
    State.DRAINED: {
        Command.ACCEPT: State.SERVING,
        Command.DRAIN: State.DRAINED,
        Command.QUIESCE: State.QUIESCED,
    },
    State.QUIESCED: {
        Command.TRIM: State.QUIESCED,
        Command.ORDER_WEIGHTS: State.QUIESCED,
        Command.WAKE: State.AWAKE,
    },
    State.AWAKE: {Command.SERVE: State.SERVING, Command.QUIESCE: State.QUIESCED},
    State.STOPPED: {},
}
QUESTIONS = {Command.CANARY, Command.DRAWS}
WITH_MODEL = {State.LOADED, State.SERVING, State.DRAINED, State.AWAKE}


def expected(state: State, command: Command) -> State | None:
    if state is State.STOPPED:
        return None
    if command is Command.STATUS:
        return state
    if command is Command.STOP:
        return State.STOPPED
    if command in QUESTIONS:
        return state if state in WITH_MODEL else None
    return LIFE[state].get(command)


@pytest.mark.parametrize("command", Command)
@pytest.mark.parametrize("state", State)
def test_every_state_answers_every_command_as_promised(state: State, command: Command) -> None:
    following = expected(state, command)

    if following is None:
        with pytest.raises(FailedPrecondition) as refused:
            advance(state, command)
        assert refused.value.reason == "ILLEGAL_TRANSITION"
        assert refused.value.metadata == {"state": state.value, "command": command.value}
    else:
        assert advance(state, command) is following


def test_a_refusal_says_what_is_possible() -> None:
    with pytest.raises(FailedPrecondition, match="possible now: load, status, stop"):
        advance(State.NEW, Command.SERVE)

"""Who may enter a host, and who waits for whom."""

from __future__ import annotations

import threading

import pytest

from dumont.errors import Unavailable
from model_host.gate import Gate


@pytest.fixture
def gate() -> Gate:
    opened = Gate()
    opened.set_open(True)
    return opened


def test_calls_inside_are_counted(gate: Gate) -> None:
    with gate.enter(), gate.enter():
        assert gate.inside == 2
    assert gate.inside == 0


def test_a_call_that_fails_has_left(gate: Gate) -> None:
    with pytest.raises(ZeroDivisionError), gate.enter():
        raise ZeroDivisionError
    assert gate.inside == 0


def test_a_closed_gate_refuses_and_running_calls_go_on(gate: Gate) -> None:
    with gate.enter():
        gate.set_open(False)
        with pytest.raises(Unavailable) as refused, gate.enter():
            raise AssertionError("entered")
        assert refused.value.reason == "INSTANCE_DRAINING"
        assert gate.inside == 1


def test_waiting_for_the_last_call_ends_when_it_leaves(gate: Gate) -> None:
    entered, leave = threading.Event(), threading.Event()

    def call() -> None:
        with gate.enter():
            entered.set()
            leave.wait(5)

    caller = threading.Thread(target=call)
    caller.start()
    assert entered.wait(5)
    assert not gate.wait_empty(timeout=0)

    leave.set()

    assert gate.wait_empty(timeout=5)
    caller.join(5)


def test_a_gate_remembers_that_anyone_came_even_if_refused() -> None:
    gate = Gate()
    assert not gate.served

    with pytest.raises(Unavailable), gate.enter():
        raise AssertionError("entered")

    assert gate.served

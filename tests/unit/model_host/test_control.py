"""The control protocol over real pipes: one line in, one line out, until stop or the end."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dumont.errors import FailedPrecondition
from model_host import control

Json = dict[str, Any]


def run(command: str, arguments: Json) -> Json:
    match command:
        case "echo" | "stop":
            return arguments
        case "refuse":
            raise FailedPrecondition("NOT_NOW", "not now", field="x", metadata={"state": "NEW"})
        case _:
            raise ZeroDivisionError("oops")


class Caller:
    """The other ends of a host's control pipes."""

    def __init__(self) -> None:
        host_in, self.to_host = os.pipe()
        self.from_host, host_out = os.pipe()
        self.thread = threading.Thread(target=self._serve, args=(host_in, host_out))
        self.thread.start()
        self.answers = os.fdopen(self.from_host)

    def _serve(self, host_in: int, host_out: int) -> None:
        try:
            control.loop(host_in, host_out, run)
        finally:
            os.close(host_in)
            os.close(host_out)

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.to_host, data) :]

    def ask(self, message: object) -> Json:
        self.write(json.dumps(message).encode() + b"\n")
        return self.read()

    def read(self) -> Json:
        answer: Json = json.loads(self.answers.readline())
        return answer

    def close(self) -> None:
        if self.to_host >= 0:
            os.close(self.to_host)
            self.to_host = -1


@pytest.fixture
def caller() -> Iterator[Caller]:
    made = Caller()
    yield made
    made.close()
    made.thread.join(5)
    made.answers.close()
    assert not made.thread.is_alive()


def test_a_command_is_answered_under_its_id(caller: Caller) -> None:
    assert caller.ask({"id": 7, "do": "echo", "x": 1}) == {"id": 7, "ok": {"x": 1}}


def test_a_refusal_carries_reason_field_and_values(caller: Caller) -> None:
    answer = caller.ask({"id": 1, "do": "refuse"})

    assert answer == {
        "id": 1,
        "error": {
            "reason": "NOT_NOW",
            "message": "not now",
            "code": "FAILED_PRECONDITION",
            "field": "x",
            "metadata": {"state": "NEW"},
        },
    }


def test_a_defect_is_an_answer_too_and_the_loop_goes_on(caller: Caller) -> None:
    assert caller.ask({"id": 1, "do": "break"})["error"]["reason"] == "HOST_FAILED"
    assert caller.ask({"id": 2, "do": "echo"}) == {"id": 2, "ok": {}}


@pytest.mark.parametrize(
    "line", [b"no json", b"[1]", b'"text"', b"{}", b'{"id": 1, "do": 5}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_bad_message_is_told_so_and_the_loop_goes_on(caller: Caller, line: bytes) -> None:
    caller.write(line + b"\n")

    assert caller.read()["error"]["reason"] == "BAD_CONTROL_MESSAGE"
    assert caller.ask({"id": 2, "do": "echo"}) == {"id": 2, "ok": {}}


def test_a_message_without_end_does_not_fill_the_memory(caller: Caller) -> None:
    caller.write(b"x" * (3 * control.MAX_LINE_BYTES) + b"\n")

    assert caller.read()["error"]["reason"] == "BAD_CONTROL_MESSAGE"
    assert caller.ask({"id": 2, "do": "echo"}) == {"id": 2, "ok": {}}


def test_messages_may_come_in_halves_or_many_at_once(caller: Caller) -> None:
    caller.write(b'{"id": 1, "do"')
    caller.write(b': "echo"}\n\n{"id": 2, "do": "echo"}\n')

    assert [caller.read()["id"], caller.read()["id"]] == [1, 2]


def test_stop_is_answered_and_ends_the_loop(caller: Caller) -> None:
    assert caller.ask({"id": 9, "do": "stop"}) == {"id": 9, "ok": {}}

    caller.thread.join(5)
    assert not caller.thread.is_alive()


def test_the_end_of_the_pipe_ends_the_loop(caller: Caller) -> None:
    caller.close()

    caller.thread.join(5)
    assert not caller.thread.is_alive()

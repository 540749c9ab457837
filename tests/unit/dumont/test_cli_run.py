"""``dumont run`` as a conversation: what is kept, what Ctrl-C and Ctrl-D do, what an error does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dumont.cli.run import Conversation, converse
from dumont.errors import FailedPrecondition, Unavailable
from dumont.types import Answer, Generation, Phase, StartInfo, Usage

START = StartInfo("resident", ("it serves",), (Phase("decide", 0.0),), 0.0, "instances/a", "nodes/one")


class Stream:
    def __init__(self, pieces: list[str | BaseException], finish: str = "end") -> None:
        self.start = START
        self._pieces = pieces
        usage = Usage(3, len(pieces))
        self.generation = Generation("", START, usage, finish, 0.1, (Answer("", finish, usage),))

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


class Deployment:
    """Answers with the streams that it was given, and remembers the requests."""

    def __init__(self, *streams: Stream | BaseException) -> None:
        self._streams = list(streams)
        self.asked: list[Any] = []

    def stream(self, prompt: str | None, **options: Any) -> Stream:
        self.asked.append(options.get("messages") or prompt)
        stream = self._streams.pop(0)
        if isinstance(stream, BaseException):
            raise stream
        return stream


def conversation(*streams: Stream | BaseException, system: str | None = None) -> tuple[Any, Conversation]:
    deployment: Any = Deployment(*streams)
    return deployment, Conversation(deployment, system, {})


def typed(*lines: str | BaseException) -> Any:
    given = iter(lines)

    def read() -> str:
        line = next(given)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_each_answer_follows_from_all_that_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    deployment, talk = conversation(Stream(["Hel", "lo."]), Stream(["Fine."]), system="Be brief.")

    converse(talk.say, typed("Hi", "", "  ", "How are you?", EOFError()))

    assert capsys.readouterr().out == "Hello.\nFine.\n"
    assert [(m["role"], m["content"]) for m in deployment.asked[1]] == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "How are you?"),
    ]  # fmt: skip


def test_an_interrupt_ends_the_answer_and_not_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    deployment, talk = conversation(Stream(["Once upon", KeyboardInterrupt()]), Stream(["Yes."]))

    converse(talk.say, typed("Tell a story", KeyboardInterrupt(), "And?", EOFError()))

    assert capsys.readouterr().out == "Once upon\nYes.\n"
    # What had come of the answer was said.
    assert deployment.asked[1][1] == {"role": "assistant", "content": "Once upon"}


def test_an_error_is_shown_and_what_led_to_it_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    deployment, talk = conversation(Unavailable("BUSY", "no room now"), Stream(["Yes."]))

    converse(talk.say, typed("Hi", "Again", EOFError()))

    assert "error: no room now [BUSY]" in capsys.readouterr().err
    assert [m["content"] for m in deployment.asked[1]] == ["Again"]


def test_a_model_without_a_chat_format_continues_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    refused = FailedPrecondition("NO_CHAT_TEMPLATE", "it has none")
    deployment, talk = conversation(refused, Stream([" time"]), Stream([" more"]))

    converse(talk.say, typed("Once upon a", "And", EOFError()))

    shown = capsys.readouterr()
    assert shown.out == " time\n more\n"
    assert shown.err.count("no chat format") == 1
    assert deployment.asked[1:] == ["Once upon a", "And"]


def test_an_answer_that_was_cut_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    _, talk = conversation(Stream(["a", "b"], finish="length"))
    talk.say("Hi")
    assert "(cut after 2 tokens; --max-new-tokens allows more)" in capsys.readouterr().err

"""Durations in, durations and sizes out."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from dumont import convert
from dumont.cli.durations import parse_duration
from dumont.cli.inference import conversation, describe_start
from dumont.cli.instances import note
from dumont.cli.output import age, print_json, short, size, span
from dumont.controller.v1 import instance_service_pb2
from dumont.types import Phase, StartInfo


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("0", 0), ("1.5", 1.5), ("30s", 30), ("5m", 300), ("1h", 3600), ("2d", 172800),
     ("1h30m", 5400), ("250ms", 0.25), (" 5m ", 300)],
)  # fmt: skip
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5x", "-5", "-5s", "1h-30m", "5 m", "1e3", "nan", "inf", "1h30"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="30s, 5m, 1h"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0s"), (0.00641, "0.00641s"), (0.25, "0.25s"), (9.994, "9.99s"), (30, "30s"),
     (59.7, "1m"), (300, "5m"), (330, "5m 30s"), (3600, "1h"), (7500, "2h 5m"), (86400, "1d"),
     (97200, "1d 3h")],
)  # fmt: skip
def test_a_duration_is_written(seconds: float | None, text: str) -> None:
    assert span(seconds) == text


@given(st.integers(10, 10**7))
def test_what_is_written_is_read_within_its_precision(seconds: int) -> None:
    read = parse_duration(span(seconds).replace(" ", ""))
    assert read <= seconds
    assert seconds - read < max(1, seconds / 24)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (214_000_000, "204 MiB"), (2**34, "16.0 GiB"),
     (2**52, "4096 TiB")],
)  # fmt: skip
def test_a_size_is_written(count: int, text: str) -> None:
    assert size(count) == text


def test_an_age_is_whole_and_never_negative() -> None:
    now = datetime.now(UTC)
    assert age(None) == ""
    assert age(now + timedelta(minutes=5)) == "0s"
    assert age(now - timedelta(hours=2, minutes=5, seconds=1)) == "2h 5m"


def test_an_id_is_the_last_part_of_a_name() -> None:
    assert (short("deployments/qa"), short("qa"), short("")) == ("qa", "qa", "")


def test_json_has_dataclasses_as_objects_and_times_as_iso(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"phase": Phase("dump", 0.5), "at": datetime(2026, 1, 2, tzinfo=UTC)})
    assert json.loads(capsys.readouterr().out) == {
        "phase": {"name": "dump", "seconds": 0.5},
        "at": "2026-01-02T00:00:00+00:00",
    }
    with pytest.raises(TypeError, match="set is not JSON"):
        print_json({1})


def test_turns_alternate_between_user_and_assistant() -> None:
    assert [message["role"] for message in conversation("Be brief.", ["a", "b", "c"])] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    with pytest.raises(typer.BadParameter, match="odd number"):
        conversation(None, ["a", "b"])
    with pytest.raises(typer.BadParameter, match="odd number"):
        conversation("Be brief.", [])


def test_a_start_is_described_in_one_line() -> None:
    start = StartInfo(
        "parked", ("instances/a is parked",), (Phase("thaw", 0.001),), 0.0064, "instances/a", "nodes/a"
    )
    assert describe_start(start) == "parked in 0.0064s: instances/a is parked"


def test_an_instance_that_was_migrated_says_that_it_ends() -> None:
    message = instance_service_pb2.Instance(
        name="instances/a", state=instance_service_pb2.Instance.STATE_SERVING
    )
    assert note(convert.instance(message)) == ""
    message.draining = True
    assert "ends after its last answer" in note(convert.instance(message))

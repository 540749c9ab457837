"""What is asked of a model under mixed load, and what is told of its memory."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from typer.testing import CliRunner

from dumont import arguments
from dumont.benchmarks.mixed import HEADERS, Found, Trend, document, draw, rows, told
from dumont.cli.main import app

MB = 10**6


def test_every_request_can_be_sent_and_no_kind_is_left_out() -> None:
    chance = random.Random(1)
    drawn = [draw(chance) for _ in range(1000)]

    for asked in drawn:
        arguments.generate_request("deployments/m", asked.prompt, **asked.options)
    used = {name for asked in drawn for name in asked.options}
    assert used == set(arguments.GenerateOptions.__annotations__) - {"messages", "progress"}
    assert any(asked.leaves is not None for asked in drawn)


def test_memory_that_stays_has_no_slope_whatever_it_took_to_warm_up() -> None:
    warm_up = [(float(second), second * MB) for second in range(250)]
    settled = [(float(second), 250 * MB + second % 2) for second in range(250, 1000)]
    slope = Trend(warm_up + settled).bytes_per_hour

    assert slope is not None
    assert abs(slope) < 1000


def test_a_leak_is_told_per_hour() -> None:
    leaking = Trend([(float(second), 100 * MB + 1000 * second) for second in range(0, 600, 5)])

    assert leaking.bytes_per_hour is not None
    assert round(leaking.bytes_per_hour) == 3_600_000
    assert Trend([(0.0, 1), (5.0, 2)]).bytes_per_hour is None


def test_what_callers_bring_about_is_no_failure() -> None:
    found = Found(outcomes=Counter({"OK": 5, "LEFT": 2, "DEADLINE_EXCEEDED": 1, "COMPUTE_FAILED": 3}))

    assert found.failed == {"COMPUTE_FAILED": 3}
    assert told(found)["failed"] == "3 COMPUTE_FAILED"
    assert told(found)["ended by their callers"] == "2 LEFT, 1 DEADLINE_EXCEEDED"


def test_the_document_and_the_table_have_all_memory() -> None:
    found = Found(
        outcomes=Counter({"OK": 2}),
        tokens=7,
        instances=[12],
        memory={"instance": Trend([(0.0, 5 * MB), (5.0, 6 * MB), (10.0, 7 * MB), (15.0, 8 * MB)])},
    )

    made = document(found, streams=3, seconds=15.0)

    assert (made["requests"], made["tokens"], made["failed"], made["instances"]) == (2, 7, {}, 1)
    assert made["memory"]["instance"]["first_bytes"] == 5 * MB
    assert made["memory"]["instance"]["bytes_per_hour"] == 720 * MB
    assert rows(found) == [("instance", "5.0 MB", "8.0 MB", "5–8 MB", "+720.0 MB")]
    assert len(rows(found)[0]) == len(HEADERS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mixed", "--serve"], "different benchmarks"),
        (["--mixed", "--config", "qwen3-tiny", "--config", "qwen3-0.6b"], "takes one model"),
        (["--relay", "--output", "/proc/none/x.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_starts(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})

    assert result.exit_code == 2
    assert said in result.output

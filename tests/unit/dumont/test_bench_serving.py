"""What a serving bench makes of the times at which tokens came."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from dumont.benchmarks import serve
from dumont.benchmarks.serving import (
    DIRECT,
    HEADERS,
    SERVICES,
    Case,
    Percentiles,
    Row,
    Stream,
    Wave,
    cells,
    document,
    remarks,
    row,
)
from dumont.errors import FailedPrecondition, InvalidArgument
from tests.conftest import require

CASE = Case(streams=2, prompt_tokens=3, answer_tokens=4)


def answer(sent: float, *arrivals: tuple[float, int], reason: str = "", tier: str = "") -> Stream:
    return Stream(sent, arrivals, reason, tier)


def made(*waves: Wave) -> Row:
    return row("m", "dumont", SERVICES, CASE, waves)


def test_tokens_are_counted_from_the_first_request_to_the_last_token() -> None:
    found = made(Wave((answer(10.0, (10.5, 1), (11.0, 3)), answer(10.1, (10.6, 2), (12.0, 2)))))

    assert found.tokens_per_s == pytest.approx(8 / 2.0)


def test_the_median_of_the_rounds_is_told() -> None:
    waves = [Wave((answer(0.0, (seconds, 4)),)) for seconds in (4.0, 1.0, 2.0)]

    assert made(*waves).tokens_per_s == pytest.approx(2.0)


def test_a_first_token_is_waited_for_from_its_own_request() -> None:
    found = made(Wave((answer(0.0, (1.0, 1)), answer(5.0, (5.25, 1)))))

    assert found.first_token == Percentiles(p50=1.0, p99=1.0)


def test_tokens_that_come_together_share_their_distance_from_the_message_before() -> None:
    found = made(Wave((answer(0.0, (1.0, 1), (1.2, 4)),)))

    assert found.inter_token is not None
    assert found.inter_token.p50 == pytest.approx(0.05)
    assert found.inter_message is not None
    assert found.inter_message.p50 == pytest.approx(0.2)


def test_the_ninety_ninth_of_a_hundred_is_nearly_the_worst() -> None:
    assert Percentiles.of([float(number) for number in range(100)]) == Percentiles(50.0, 99.0)
    assert Percentiles.of([]) is None


def test_answers_that_failed_are_counted_and_leave_the_rest_as_it_is() -> None:
    found = made(Wave((answer(0.0, (1.0, 4)), answer(0.0, reason="QUEUE_FULL"))))

    assert found.failed == {"QUEUE_FULL": 1}
    assert found.tokens_per_s == pytest.approx(4.0)
    assert remarks(found) == "1 failed: QUEUE_FULL"


def test_nothing_at_all_is_told_as_nothing() -> None:
    found = made(Wave((answer(0.0, reason="QUEUE_FULL"),)))

    assert (found.tokens_per_s, found.first_token, found.inter_token) == (0.0, None, None)
    assert len(cells(found)) == len(HEADERS)


def test_a_generator_that_was_busy_and_a_start_are_remarked_upon() -> None:
    found = made(Wave((answer(0.0, (1.0, 4), tier="local"),), client_load=0.97))

    assert remarks(found) == "from local; the client is the bound (0.97 cores)"
    assert remarks(made(Wave((answer(0.0, (1.0, 4), tier="resident"),), client_load=0.5))) == ""


def test_a_row_is_told_as_agreed() -> None:
    told = document(made(Wave((answer(0.0, (0.5, 1), (0.75, 1)),))))

    assert json.loads(json.dumps(told)) == told
    assert (told["engine"], told["streams"], told["path"]) == ("dumont", 2, "services")
    assert told["tokens_per_s"] == 2.7
    assert told["first_token"] == {"p50": 0.5, "p99": 0.5}
    assert told["inter_token"] == {"p50": 0.25, "p99": 0.25}


def test_a_plan_has_every_length_with_every_number_of_streams() -> None:
    plan = serve.plan(
        [], streams=[1, 8], wakes=[200], prompt_tokens=[32, 512], answer_tokens=[128], rounds=2,
        engines=["generate"], vllm_site=None, vllm_arguments={},
    )  # fmt: skip

    assert plan.cases == (Case(1, 32, 128), Case(8, 32, 128), Case(1, 512, 128), Case(8, 512, 128))
    assert plan.wakes == (Case(200, 32, 128),)
    assert plan.engines == ("generate",)


@pytest.mark.parametrize(
    ("engines", "error", "reason"),
    [
        (["tgi"], InvalidArgument, "UNKNOWN_ENGINE"),
        (["vllm"], FailedPrecondition, "VLLM_NOT_INSTALLED"),
    ],
)
def test_an_engine_that_is_not_there_is_refused_when_it_is_asked_for(
    engines: list[str], error: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_has_vllm", lambda site: False)

    with pytest.raises(error) as refused:
        serve.plan(
            [], streams=[1], wakes=[], prompt_tokens=[1], answer_tokens=[1], rounds=1,
            engines=engines, vllm_site=None, vllm_arguments={},
        )  # fmt: skip

    assert getattr(refused.value, "reason", "") == reason


def test_a_picture_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    require(find_spec("matplotlib") is not None, "matplotlib is not installed; run scripts/setup")
    from dumont.benchmarks.plot import draw_serving

    rows = [
        row("m", engine, path, Case(count, 3, 4), [Wave((answer(0.0, (1.0, 1), (2.0, 3)),))])
        for engine, path in (("dumont", SERVICES), ("vllm", DIRECT))
        for count in (1, 8)
    ]
    draw_serving(tmp_path / "picture.png", rows, {"cpu": "a CPU"})

    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n")

"""What a bench makes of its samples."""

from __future__ import annotations

import pytest

from dumont.benchmarks.results import (
    Costs,
    Row,
    Sample,
    Spread,
    after_imports,
    apart,
    different_answers,
    medians,
    rows,
    sample,
)

ANSWER = (1, 2, 3)


def taken(*seconds: float) -> list[Sample]:
    return [Sample(value, {"load": value}, ANSWER) for value in seconds]


def test_a_spread_is_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_after_the_imports_is_the_same_run_without_them() -> None:
    run = Sample(10.0, {"imports": 6.0, "load": 3.0, "first_token": 1.0}, ANSWER)
    assert after_imports(run) == Sample(4.0, {"load": 3.0, "first_token": 1.0}, ANSWER)


def test_a_step_that_is_told_with_its_parts_counts_only_what_they_leave() -> None:
    told = [("launch", 1.0), ("load", 5.0), ("load.import_torch", 3.0), ("load.weights", 1.5), ("serve", 0.5)]
    phases = apart(told)
    assert phases == {
        "launch": 1.0,
        "load": 0.5,
        "load.import_torch": 3.0,
        "load.weights": 1.5,
        "serve": 0.5,
    }
    assert list(phases) == [name for name, _ in told]


def test_parts_that_overlap_leave_nothing_rather_than_less() -> None:
    assert apart([("load", 1.0), ("load.a", 0.8), ("load.b", 0.7)])["load"] == 0.0


def test_what_the_client_waited_beyond_the_steps_is_other() -> None:
    seen = sample(2.0, [("criu", 0.75), ("wake", 0.25)], 0.5, [1, 2])
    assert seen.phases == {"criu": 0.75, "wake": 0.25, "first_token": 0.5, "other": 0.5}
    assert seen.tokens == (1, 2)
    assert sum(seen.phases.values()) == seen.seconds
    assert sample(1.0, [("criu", 2.0)], 0.5, []).phases["other"] == 0.0


def test_a_phase_that_a_sample_lacks_took_no_time_in_it() -> None:
    found = medians([{"criu": 1.0}, {"criu": 3.0, "fetch": 4.0}, {"criu": 2.0}])
    assert found == {"criu": 2.0, "fetch": 0.0}


def test_rows_come_in_the_usual_order_with_ratios_to_both_baselines() -> None:
    samples = {"local": taken(0.5, 1.0, 0.75), "stock": taken(3.0), "plain_cold": taken(12.0, 9.0)}
    costs = {"local": Costs(image_bytes=10, stored_bytes=4)}
    plain, local, stock = rows("m", samples, costs, ("local", "stock", "plain_cold"))
    assert [row.case for row in (plain, local, stock)] == ["plain_cold", "local", "stock"]
    assert local == Row(
        "m", "local", 3, Spread(0.75, 0.5, 1.0), {"load": 0.75}, {"plain_cold": 14.0, "stock": 4.0},
        costs["local"],
    )  # fmt: skip
    assert stock.ratios == {"plain_cold": 3.5}
    assert stock.costs == Costs()
    assert plain.ratios == {"stock": pytest.approx(3 / 10.5)}


def test_what_was_measured_on_the_way_but_not_asked_for_is_no_row() -> None:
    found = rows("m", {"cold": taken(2.0), "parked": taken(1.0)}, {}, ("parked",))
    assert [row.case for row in found] == ["parked"]


def test_answers_of_one_group_must_agree_and_the_others_may_differ() -> None:
    samples = {"cold": taken(1.0), "local": taken(1.0, 2.0), "stock": [Sample(1.0, {}, (9,))]}
    assert different_answers(samples) == ""
    samples["parked"] = [Sample(1.0, {}, (1, 2, 4))]
    assert "parked [1, 2, 4]" in different_answers(samples)

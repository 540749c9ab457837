"""The simulation: the same seed gives the same figures, and they are what the policies must give."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from controller.simulation import __main__ as command
from controller.simulation import baselines, figures, fleet, trace
from controller.simulation.results import Result, percentile
from controller.simulation.virtual import VirtualLoop

MODELS, MACHINE = figures.load()
HOUR = 3600.0


@pytest.fixture(scope="module")
def made() -> trace.Trace:
    return trace.make(50, HOUR / 2, MODELS, seed=1)


def simulated(made: trace.Trace, **changes: Any) -> Result:
    settings = fleet.Fleet(nodes=10, gpus=1, idle_timeout=15.0, park_timeout=600.0, seed=1)
    machine = replace(MACHINE, **changes.pop("machine", {}))
    return fleet.run(made, replace(settings, **changes), machine)


def comparable(result: Result) -> dict[str, Any]:
    """Without the times that the decisions took."""
    return {k: v for k, v in asdict(result).items() if k not in ("decisions_per_second", "decision_seconds")}


@pytest.fixture(scope="module")
def ours(made: trace.Trace) -> Result:
    return simulated(made)


def test_the_same_seed_gives_the_same_result_and_another_one_another(made: trace.Trace, ours: Result) -> None:
    assert comparable(simulated(made)) == comparable(ours)
    assert trace.make(50, HOUR / 2, MODELS, seed=1) == made
    other = trace.make(50, HOUR / 2, MODELS, seed=2)
    assert comparable(simulated(other, seed=2)) != comparable(ours)


def test_every_request_is_answered_and_nine_tenths_of_the_gpus_are_saved(
    made: trace.Trace, ours: Result
) -> None:
    warm = baselines.always_warm(made, MACHINE)
    assert ours.failures == {}
    assert sum(ours.tiers.values()) == len(ours.first_token) == len(made.arrivals)
    assert {"resident", "parked", "local"} <= ours.tiers.keys()
    assert ours.saved(warm) >= 0.9
    assert ours.percentile(99) <= 2.0


def test_a_longer_idle_timeout_costs_gpus_and_saves_waiting(made: trace.Trace, ours: Result) -> None:
    longer = simulated(made, idle_timeout=300.0)
    assert longer.gpu_hours > ours.gpu_hours
    assert longer.tiers["resident"] > ours.tiers["resident"]
    assert longer.percentile(90) <= ours.percentile(90)


def test_no_gpu_ever_holds_more_than_it_has(made: trace.Trace) -> None:
    # Each GPU takes one of the larger models: a start that does not fit fails the simulation's own check.
    largest = max(model.gpu_bytes for model in MODELS)
    crowded = simulated(made, nodes=2, machine={"gpu_bytes": largest + (1 << 30)})
    assert sum(crowded.tiers.values()) + sum(crowded.failures.values()) == len(made.arrivals)
    assert crowded.gpu_hours <= 1.02


def test_the_baselines_are_what_they_are_called(made: trace.Trace) -> None:
    warm = baselines.always_warm(made, MACHINE)
    cold = baselines.always_cold(made, MACHINE, 1)
    lru = baselines.least_recently_used(made, MACHINE, 10, 1)

    held = sum(model.gpu_bytes for model in made.models)
    assert warm.gpu_hours == pytest.approx(held / MACHINE.gpu_bytes / 2)
    assert warm.percentile(100) == max(model.first_token for model in MODELS)
    assert cold.gpu_hours < lru.gpu_hours < warm.gpu_hours
    # With room for all, a model is loaded once.
    assert lru.tiers["cold"] == len({arrival.deployment for arrival in made.arrivals})
    assert cold.tiers["cold"] > 3 * lru.tiers["cold"]
    assert cold.percentile(99) > min(model.cold[1] for model in MODELS)


def test_lru_evicts_what_was_used_longest_ago(made: trace.Trace) -> None:
    roomy = baselines.least_recently_used(made, MACHINE, 10, 1)
    tight = baselines.least_recently_used(made, replace(MACHINE, gpu_bytes=40_000_000_000), 1, 1)
    assert tight.tiers["cold"] > roomy.tiers["cold"]
    assert tight.gpu_hours <= 0.5


def test_the_trace_has_the_published_shares_of_rare_and_busy_deployments() -> None:
    day = trace.make(500, 24 * HOUR, MODELS, seed=3)
    counts = [0] * 500
    for arrival in day.arrivals:
        counts[arrival.deployment] += 1
    # Means over one day scatter around their rates.
    assert sum(count <= 24 for count in counts) / 500 == pytest.approx(0.45, abs=0.08)
    assert sum(count <= 24 * 60 for count in counts) / 500 == pytest.approx(0.81, abs=0.05)
    assert [arrival.at for arrival in day.arrivals] == sorted(arrival.at for arrival in day.arrivals)
    share = sum(model is MODELS[0] for model in day.models) / 500
    assert share == pytest.approx(MODELS[0].share, abs=0.05)


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, p) for p in (1, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([], 99) == 0.0
    assert percentile([7.0], 50) == 7.0


def test_virtual_time_passes_only_while_nothing_is_to_be_done() -> None:
    async def work() -> list[float]:
        loop = asyncio.get_running_loop()
        seen = [loop.time()]
        await asyncio.sleep(3600)
        seen.append(loop.time())
        for _ in range(1000):
            await asyncio.sleep(0)
        seen.append(loop.time())
        return seen

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        begin, later, end = runner.run(work())
    assert (begin, round(later, 3), round(end, 3)) == (0.0, 3600.0, 3600.0)


def test_a_wait_for_nothing_ends_with_an_error_instead_of_hanging() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    runner = asyncio.Runner(loop_factory=VirtualLoop)
    with pytest.raises(RuntimeError, match="nothing will bring about"):
        runner.run(work())
    runner.close()


def test_the_command_prints_a_table_and_writes_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    flags = ["--nodes", "2", "--deployments", "10", "--hours", "0.1", "--idle", "5", "--idle", "60"]
    command.main([*flags, "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "POLICY", "always warm", "always cold", "LRU, cold starts", "Dumont, idle 5 s", "Dumont, idle 60 s",
    ]  # fmt: skip
    document = json.loads(output.read_text())
    warm, *_, last = document["policies"]
    assert warm["saved"] == 0.0
    assert last["decisions_per_second"] > 0

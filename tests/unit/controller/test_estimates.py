"""How long a start will take, by what was measured."""

from __future__ import annotations

import pytest

from controller.estimates import ASSUMED, Estimates, Size, Work, measured
from controller.model import InstanceState, Phase, Report, Tier

GIB = 1 << 30


def report(*phases: tuple[str, float], **facts: object) -> Report:
    made = tuple(Phase(name, seconds) for name, seconds in phases)
    return Report("qa-1", "qa", InstanceState.SERVING, phases=made, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ((("fetch", 60.0), ("launch", 1.0), ("load", 5.0), ("load.warm_up", 2.0)), {Work.START: 6.0}),
        ((("check", 0.1), ("criu", 0.2)), {Work.RESTORE: 0.3}),
        ((("check", 0.1), ("fetch", 4.0), ("criu", 0.2)), {Work.FETCH: 4.0, Work.RESTORE: 0.3}),
        ((("weights", 3.0), ("criu", 0.2)), {Work.RESTORE: 0.2}),
        ((("cuda_restore", 0.1), ("wake", 0.1)), {Work.RESUME: 0.2}),
        ((("thaw", 0.01), ("accept", 0.01)), {Work.RESUME: 0.02}),
        ((), {}),
    ],
    ids=["cold", "local", "remote", "weights from disk", "resume on a GPU", "resume on a CPU", "nothing"],
)
def test_the_phases_of_an_instance_say_what_was_measured(
    phases: tuple[tuple[str, float], ...], expected: dict[Work, float]
) -> None:
    found = dict(measured([Phase(name, seconds) for name, seconds in phases]))
    assert found == pytest.approx(expected)


def test_before_anything_was_measured_a_faster_tier_is_assumed_to_be_faster() -> None:
    nothing = Estimates()
    tiers = (Tier.RESIDENT, Tier.PARKED, Tier.LOCAL, Tier.REMOTE, Tier.COLD)
    seconds = [nothing.start("qa", "n1", tier, GIB).seconds for tier in tiers]
    assert seconds == sorted(seconds)
    assert nothing.start("qa", "n1", Tier.COLD).seconds == ASSUMED[Work.START][0]


def test_a_deployment_is_estimated_by_what_it_took_here_then_by_what_it_took_elsewhere() -> None:
    known = Estimates()
    known.took("qa", "n1", Work.RESTORE, 0.4)
    known.took("qa", "n2", Work.RESTORE, 0.9)

    assert known.start("qa", "n1", Tier.LOCAL).seconds == pytest.approx(0.4)
    assert known.start("qa", "n2", Tier.LOCAL).seconds == pytest.approx(0.9)
    assert 0.4 < known.start("qa", "n3", Tier.LOCAL).seconds < 0.9
    assert "measured here 1 times" in known.start("qa", "n1", Tier.LOCAL).basis
    assert "measured elsewhere 2 times" in known.start("qa", "n3", Tier.LOCAL).basis


def test_a_new_measurement_moves_the_estimate_and_one_outlier_does_not_decide_it() -> None:
    known = Estimates()
    for seconds in (1.0, 1.0, 1.0, 11.0):
        known.took("qa", "n1", Work.START, seconds)
    assert 1.0 < known.start("qa", "n1", Tier.COLD).seconds < 6.0
    for _ in range(20):
        known.took("qa", "n1", Work.START, 11.0)
    assert known.start("qa", "n1", Tier.COLD).seconds == pytest.approx(11.0, rel=0.05)


def test_what_was_never_measured_is_estimated_by_its_size_and_the_speed_of_the_node() -> None:
    known = Estimates()
    # This node fetches at twice the assumed speed.
    base, speed = ASSUMED[Work.FETCH]
    known.took("other", "fast", Work.FETCH, (base + GIB / speed) / 2, GIB)

    fast = known.seconds("qa", "fast", Work.FETCH, 4 * GIB)
    assert fast == pytest.approx((base + 4 * GIB / speed) / 2)
    assert known.seconds("qa", "fast", Work.FETCH, GIB) < fast
    assert "the node's speed" in known.start("qa", "fast", Tier.REMOTE, GIB).basis


@pytest.mark.parametrize("tier", [Tier.PARKED, Tier.LOCAL, Tier.REMOTE, Tier.COLD])
def test_no_node_is_estimated_below_the_least(tier: Tier) -> None:
    known = Estimates()
    for node, seconds in (("n1", 0.7), ("n2", 0.2), ("n3", 5.0)):
        for work in Work:
            known.took("other", node, work, seconds, GIB)
    for deployment in ("other", "new"):
        least = known.least(deployment, tier, GIB)
        nodes = ("n1", "n2", "n3", "n4")
        assert all(known.start(deployment, node, tier, GIB).seconds >= least for node in nodes)


def test_a_report_is_measured_once() -> None:
    known = Estimates()
    first = report(("criu", 0.5), snapshot="s1")
    known.learn("n1", first, None)
    known.learn("n1", first, first)
    assert "1 times" in known.start("qa", "n1", Tier.LOCAL).basis
    known.learn("n1", report(("thaw", 0.1), snapshot="s1"), first)
    assert known.start("qa", "n1", Tier.PARKED).seconds == pytest.approx(0.1)


def test_the_sizes_of_an_instance_are_remembered_while_it_serves_and_while_it_is_parked() -> None:
    known = Estimates()
    assert known.size("qa") == Size()
    serving = report(gpu="GPU-a", gpu_bytes=8 * GIB, ram_bytes=2 * GIB)
    known.learn("n1", serving, None)
    assert known.size("qa") == Size(8 * GIB, 2 * GIB, 2 * GIB)

    parked = Report("qa-1", "qa", InstanceState.PARKED, gpu="GPU-a", gpu_bytes=8 * GIB, ram_bytes=3 * GIB)
    known.learn("n1", parked, serving)
    assert known.size("qa") == Size(8 * GIB, 2 * GIB, 3 * GIB)


def test_a_model_that_was_never_measured_needs_its_weights_and_what_an_engine_takes() -> None:
    known = Estimates()
    assert (known.gpu_bytes("qa", 80 * GIB), known.ram_bytes("qa")) == (0, 0)
    known.weights_bytes["qa"] = 14 * GIB
    assert known.gpu_bytes("qa", 80 * GIB) == (14 + 1 + 20) * GIB
    # A smaller GPU may do with a smaller cache, but not without the weights.
    assert known.gpu_bytes("qa", 16 * GIB) == 16 * GIB
    assert known.gpu_bytes("qa", 8 * GIB) == 15 * GIB
    assert known.ram_bytes("qa") > 14 * GIB


def test_a_deployment_that_is_gone_leaves_nothing() -> None:
    known = Estimates()
    known.took("qa", "n1", Work.START, 100.0)
    known.learn("n1", report(ram_bytes=5), None)
    known.forget("qa")
    assert known.size("qa") == Size()
    assert "measured" not in known.start("qa", "n1", Tier.COLD).basis


def test_a_node_that_read_one_models_weights_from_disk_is_not_slow_for_others() -> None:
    known = Estimates()
    before = known.start("other", "n1", Tier.LOCAL, GIB).seconds
    known.learn("n1", report(("weights", 30.0), ("criu", before), snapshot="s"), None, GIB)
    assert known.start("other", "n1", Tier.LOCAL, GIB).seconds == pytest.approx(before)

"""The start that each situation gets: start mode x instance x snapshot x node."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from controller.estimates import Estimates, Work
from controller.model import (
    Checkpoint,
    Deployment,
    Finding,
    Gpu,
    Instance,
    InstanceState,
    Node,
    NodeState,
    Report,
    Snapshot,
    StartMode,
    Tier,
    Weights,
)
from controller.policy import (
    CONNECT_PATIENCE,
    LOAD_SECONDS,
    QUEUE_SECONDS,
    Attempt,
    Facts,
    Tenants,
    Wait,
    decide,
    explain,
    loaded,
    place,
    wants_another,
)
from controller.room import NoRoom, Tenant
from controller.routing import choose
from dumont.errors import ResourceExhausted, Unavailable

NOW = 1000.0
SETTLING = {
    InstanceState.STARTING,
    InstanceState.RESUMING,
    InstanceState.CAPTURING,
    InstanceState.PARKING,
    InstanceState.MOVING,
}
SEEN = [state for state in InstanceState if state not in (InstanceState.UNKNOWN, InstanceState.GONE)]


def deployment(mode: StartMode = StartMode.CHECKPOINT) -> Deployment:
    checkpoint = Checkpoint(mode is StartMode.CHECKPOINT)
    return Deployment("qa", "u", "m", "causal_lm", mode, checkpoint, None, None, 1.0, 1.0, "e")


def instance(state: InstanceState, identifier: str = "qa-1", **facts: Any) -> Instance:
    report = Report(identifier, "qa", state, create_time=1.0)
    return replace(Instance("n1", state, report, NOW, NOW), **facts)


def snapshot(identifier: str = "s1", **facts: Any) -> Snapshot:
    return replace(Snapshot(identifier, "qa", "n1", 10.0, owner="u"), **facts)


def node(state: NodeState = NodeState.READY, identifier: str = "n1", **facts: Any) -> Node:
    return replace(Node(identifier, "x:1", state=state, checkpoint_capable=True), **facts)


def facts(mode: StartMode = StartMode.CHECKPOINT, **known: Any) -> Facts:
    return replace(Facts(deployment(mode), (), (), {"n1": node()}), **known)


@pytest.mark.parametrize(
    ("mode", "state", "snapshots", "node_state"),
    list(
        itertools.product(
            StartMode,
            [None, *SEEN],
            [(), (snapshot(),), (snapshot(quarantined=True),)],
            NodeState,
        )
    ),
)
def test_the_fastest_tier_there_is(
    mode: StartMode,
    state: InstanceState | None,
    snapshots: tuple[Snapshot, ...],
    node_state: NodeState,
) -> None:
    instances = () if state is None else (instance(state, served=True),)
    known = facts(mode, instances=instances, snapshots=snapshots, nodes={"n1": node(node_state)})

    if node_state is NodeState.UNREACHABLE:
        with pytest.raises(Unavailable) as refusal:
            decide(known, NOW)
        assert refusal.value.reason == "NO_NODE"
        return
    decision = decide(known, NOW)
    assert decision.reason
    if node_state is NodeState.CONNECTING:
        assert isinstance(decision, Wait)
        assert decision.nodes == ("n1",)
    elif state in SETTLING:
        assert isinstance(decision, Wait)
        assert decision.instance == "qa-1"
    else:
        assert isinstance(decision, Attempt)
        restorable = mode is StartMode.CHECKPOINT and snapshots and not snapshots[0].quarantined
        tiers: dict[InstanceState | None, Tier] = {
            InstanceState.SERVING: Tier.RESIDENT,
            InstanceState.PARKED: Tier.PARKED,
        }
        expected = tiers.get(state, Tier.LOCAL if restorable else Tier.COLD)
        assert decision.tier is expected
        assert decision.capture is (expected is Tier.COLD and mode is StartMode.CHECKPOINT)


def test_a_clean_resident_instance_is_captured_before_its_first_prompt() -> None:
    decision = decide(facts(instances=(instance(InstanceState.SERVING),)), NOW)
    assert isinstance(decision, Attempt)
    assert (decision.tier, decision.capture) == (Tier.RESIDENT, True)


@pytest.mark.parametrize(
    "change",
    [
        {"instances": (instance(InstanceState.SERVING, served=True),)},
        {"instances": (instance(InstanceState.SERVING, in_flight=1),)},
        {"instances": (instance(InstanceState.SERVING),), "snapshots": (snapshot(),)},
        {"instances": (instance(InstanceState.SERVING),), "capture_at": NOW + 1},
        {"instances": (instance(InstanceState.SERVING),), "nodes": {"n1": node(checkpoint_capable=False)}},
    ],
    ids=["served", "in flight", "has snapshot", "backing off", "node cannot"],
)
def test_no_capture_of_a_resident_instance_when(change: dict[str, Any]) -> None:
    decision = decide(facts(**change), NOW)
    assert isinstance(decision, Attempt)
    assert (decision.tier, decision.capture) == (Tier.RESIDENT, False)


def weighed(weights: Weights, **known: Any) -> Facts:
    """Of a deployment that wants its weights so."""
    wanted = replace(deployment(), checkpoint=Checkpoint(True, weights=weights))
    return facts(deployment=wanted, **known)


@pytest.mark.parametrize("weights", Weights)
@pytest.mark.parametrize("wanted", Weights)
@pytest.mark.parametrize("held", [True, False], ids=["held", "published"])
def test_a_snapshot_is_restored_if_its_weights_are_where_they_are_wanted(
    weights: Weights, wanted: Weights, held: bool
) -> None:
    known = snapshot(weights=weights, local=held, published=True)
    decision = decide(weighed(wanted, snapshots=(known,)), NOW)
    assert isinstance(decision, Attempt)
    if weights is wanted:
        assert (decision.tier, decision.capture) == (Tier.LOCAL if held else Tier.REMOTE, False)
    else:
        assert (decision.tier, decision.capture) == (Tier.COLD, True)
        assert f"snapshots/s1 has its weights {weights.value}, not {wanted.value}" in decision.reason


@pytest.mark.parametrize("weights", Weights)
def test_a_clean_instance_is_captured_if_its_weights_are_where_they_are_wanted(weights: Weights) -> None:
    report = Report("qa-1", "qa", InstanceState.SERVING, create_time=1.0, weights=weights)
    serving = instance(InstanceState.SERVING, report=report)
    decision = decide(weighed(Weights.INCLUDED, instances=(serving,)), NOW)
    assert isinstance(decision, Attempt)
    assert (decision.tier, decision.capture) == (Tier.RESIDENT, weights is Weights.INCLUDED)


def test_what_failed_in_this_start_is_not_chosen_again() -> None:
    known = facts(instances=(instance(InstanceState.PARKED),), snapshots=(snapshot(), snapshot("s0")))
    tiers = []
    failed: frozenset[str] = frozenset()
    for name in ("instances/qa-1", "snapshots/s1", "snapshots/s0", None):
        decision = decide(replace(known, failed=failed), NOW)
        assert isinstance(decision, Attempt)
        tiers.append((decision.tier, decision.snapshot))
        failed |= {name} if name else set()
    assert tiers == [(Tier.PARKED, ""), (Tier.LOCAL, "s1"), (Tier.LOCAL, "s0"), (Tier.COLD, "")]


def test_the_newest_snapshot_is_restored() -> None:
    known = facts(snapshots=(snapshot("old", create_time=1.0), snapshot("new", create_time=2.0)))
    decision = decide(known, NOW)
    assert isinstance(decision, Attempt)
    assert decision.snapshot == "new"


def test_a_snapshot_on_a_node_that_cannot_restore_is_passed_over() -> None:
    known = facts(snapshots=(snapshot(),), nodes={"n1": node(checkpoint_capable=False)})
    decision = decide(known, NOW)
    assert isinstance(decision, Attempt)
    assert (decision.tier, decision.capture) == (Tier.COLD, False)


def test_a_cold_start_says_what_kept_it_from_a_faster_tier() -> None:
    shared = Finding("gpu_mig", False, "MIG is enabled on GPU-a")
    other = (
        "snapshots/s2 cannot be restored here: nvidia_driver was 580.1 at capture and is 590.2 on this node"
    )
    known = facts(
        snapshots=(
            snapshot("s1", quarantined=True, quarantine_reason="its canary answered wrongly"),
            snapshot("s2", incompatibility=other),
        ),
        nodes={"n1": node(checkpoint_capable=False, findings=(Finding("criu", True, "CRIU 4.1"), shared))},
    )
    decision = decide(known, NOW)
    assert isinstance(decision, Attempt)
    assert decision.tier is Tier.COLD
    assert "its canary answered wrongly" in decision.reason
    assert other in decision.reason
    assert "nodes/n1 cannot checkpoint: MIG is enabled on GPU-a" in decision.reason
    assert "CRIU 4.1" not in decision.reason


TWO = {"n1": node(), "n2": node(NodeState.CONNECTING, "n2", since=NOW)}


def test_a_connecting_node_delays_nobody_who_has_nothing_there() -> None:
    serving = instance(InstanceState.SERVING, served=True)
    for known in ((), (serving,)):
        assert isinstance(decide(facts(nodes=TWO, instances=known), NOW), Attempt)
    # Nor one whose snapshot is elsewhere.
    held = decide(facts(nodes=TWO, snapshots=(snapshot(),), captured_on=frozenset({"n1", "n2"})), NOW)
    assert isinstance(held, Attempt)
    assert held.tier is Tier.LOCAL


@pytest.mark.parametrize(
    "known",
    [
        {"started_on": frozenset({"n2", "n9"})},
        {"instances": (instance(InstanceState.SERVING, node="n2"),)},
    ],
    ids=["started there before this controller began", "seen there"],
)
def test_a_connecting_node_that_may_hold_an_instance_is_waited_for(known: dict[str, Any]) -> None:
    decision = decide(facts(nodes=TWO, **known), NOW)
    assert isinstance(decision, Wait)
    assert (decision.nodes, decision.until) == (("n2",), None)


@pytest.mark.parametrize(
    "known",
    [{"captured_on": frozenset({"n2"})}, {"snapshots": (snapshot(node="n2"),)}],
    ids=["captured there before this controller began", "seen there"],
)
def test_a_connecting_node_that_may_hold_a_snapshot_is_waited_for_a_moment(known: dict[str, Any]) -> None:
    decision = decide(facts(nodes=TWO, **known), NOW)
    assert isinstance(decision, Wait)
    assert (decision.nodes, decision.until) == (("n2",), NOW + CONNECT_PATIENCE)
    late = decide(facts(nodes=TWO, **known), NOW + CONNECT_PATIENCE)
    assert isinstance(late, Attempt)
    assert late.tier is Tier.COLD
    warm = decide(facts(StartMode.WARM, nodes=TWO, **known), NOW)
    assert isinstance(warm, Attempt)


def test_a_cold_start_goes_to_the_capable_node_with_most_memory() -> None:
    nodes = {
        "a": node(identifier="a", memory_available_bytes=1),
        "b": node(identifier="b", memory_available_bytes=2),
        "c": node(identifier="c", memory_available_bytes=9, checkpoint_capable=False),
        "d": node(NodeState.UNREACHABLE, "d", memory_available_bytes=99),
    }
    assert place(nodes).id == "b"
    assert place(nodes, frozenset({"nodes/b"})).id == "a"
    with pytest.raises(Unavailable, match="no node is ready"):
        place({})


def test_a_joined_restore_keeps_its_tier() -> None:
    restoring = instance(InstanceState.STARTING)
    restoring = replace(restoring, report=replace(restoring.report, snapshot="s1"))
    decision = decide(facts(instances=(restoring,)), NOW)
    assert isinstance(decision, Wait)
    assert decision.tier is Tier.LOCAL


def test_a_request_goes_to_the_instance_with_the_fewest_in_flight() -> None:
    busy = instance(InstanceState.SERVING, "a", in_flight=24)
    idle = instance(InstanceState.SERVING, "b", in_flight=8)
    twin = instance(InstanceState.SERVING, "c", in_flight=8)
    assert choose([busy, twin, idle]) is idle
    assert choose([]) is None


def test_the_oldest_takes_what_it_has_capacity_to_spare_for_so_that_younger_ones_become_idle() -> None:
    oldest = instance(InstanceState.SERVING, "a", in_flight=7)
    younger = instance(InstanceState.SERVING, "b", in_flight=0)
    assert choose([younger, oldest]) is oldest
    assert choose([younger, replace(oldest, in_flight=8)]) is younger


@pytest.mark.parametrize(
    ("most", "waited", "loaded_for", "others", "wanted"),
    [
        (2, QUEUE_SECONDS, None, (), True),
        (2, QUEUE_SECONDS / 2, None, (), False),
        (2, None, LOAD_SECONDS, (), True),
        (2, None, LOAD_SECONDS / 2, (), False),
        (1, 60.0, 60.0, (), False),
        (2, 60.0, None, (InstanceState.STARTING,), False),
        (2, 60.0, None, (InstanceState.PARKED,), True),
        (3, 60.0, None, (InstanceState.SERVING,), True),
    ],
    ids=[
        "a request has waited",
        "it has not waited for long",
        "all are loaded",
        "they were loaded for a moment",
        "one is the limit",
        "one is coming",
        "one is parked",
        "a third",
    ],
)
def test_another_instance_is_wanted_when(
    most: int,
    waited: float | None,
    loaded_for: float | None,
    others: tuple[InstanceState, ...],
    wanted: bool,
) -> None:
    known = facts(
        deployment=replace(deployment(), max_instances=most),
        instances=tuple(
            instance(state, f"i{number}", since=0.0)
            for number, state in enumerate((InstanceState.SERVING, *others))
        ),
    )
    arrived, since = (None if one is None else NOW - one for one in (waited, loaded_for))
    assert bool(wants_another(known, NOW, arrived, since)) is wanted


def test_the_time_of_the_first_start_is_no_reason_for_another() -> None:
    known = facts(
        deployment=replace(deployment(), max_instances=2),
        instances=(instance(InstanceState.SERVING, since=NOW - 0.1),),
    )
    assert not wants_another(known, NOW, NOW - 30.0, None)


def test_a_deployment_is_loaded_when_each_of_its_instances_is() -> None:
    full = instance(InstanceState.SERVING, "a", in_flight=52)
    assert loaded([full])
    assert not loaded([full, instance(InstanceState.SERVING, "b", in_flight=51)])
    assert not loaded([])


# Where: room, estimates and GPUs

GIB = 1 << 30


def gpu_node(identifier: str = "g1", total: int = 10, **known: Any) -> Node:
    gpus = (Gpu(f"GPU-{identifier}", "H", total * GIB, free_bytes=total * GIB),)
    return node(identifier=identifier, gpus=gpus, **known)


def tenant(where: str, gpu: int = 0, ram: int = 0, **known: Any) -> Tenant:
    """An instance of another deployment."""
    name = f"other-on-{where}"
    report = Report(
        name,
        name,
        InstanceState.SERVING,
        gpu=f"GPU-{where}" if gpu else "",
        gpu_bytes=gpu * GIB,
        ram_bytes=ram * GIB,
    )
    mine = {key: known.pop(key) for key in ("in_flight", "idle_since") if key in known}
    made = replace(Instance(where, InstanceState.SERVING, report, 0.0, 0.0), **mine)
    return Tenant(made, **{"park_seconds": 0.5, "stop_seconds": 0.2} | known)


def around(*tenants: Tenant) -> Tenants:
    return lambda where: [one for one in tenants if one.instance.node == where]


def sized(gpu: int = 0, ram: int = 0) -> Estimates:
    """Estimates that know how much an instance of ``qa`` takes."""
    known = Estimates()
    known.learn(
        "n1",
        Report(
            "qa-0",
            "qa",
            InstanceState.SERVING,
            gpu="GPU-0" if gpu else "",
            gpu_bytes=gpu * GIB,
            ram_bytes=ram * GIB,
        ),
        None,
    )
    return known


def attempt(known: Facts) -> Attempt:
    decision = decide(known, NOW)
    assert isinstance(decision, Attempt), decision
    return decision


def test_a_model_goes_to_a_gpu_even_if_a_node_without_one_has_more_memory() -> None:
    nodes = {"n1": node(memory_available_bytes=999 * GIB), "g1": gpu_node(memory_available_bytes=GIB)}
    decision = attempt(facts(nodes=nodes, estimates=sized(gpu=6)))
    assert (decision.tier, decision.node, decision.gpu) == (Tier.COLD, "g1", "GPU-g1")
    assert place(nodes).id == "g1"


def test_it_goes_to_a_cpu_if_no_gpu_is_large_enough_or_its_start_there_has_failed() -> None:
    nodes = {"n1": node(), "g1": gpu_node(total=4)}
    assert attempt(facts(nodes=nodes, estimates=sized(gpu=6))).node == "n1"
    failed = frozenset({"nodes/g1"})
    nodes = {"n1": node(), "g1": gpu_node()}
    assert attempt(facts(nodes=nodes, estimates=sized(gpu=6), failed=failed)).node == "n1"


def test_of_equal_nodes_the_one_where_nobody_must_yield_is_chosen() -> None:
    nodes = {name: gpu_node(name) for name in ("g1", "g2", "g3")}
    full = around(tenant("g1", gpu=8), tenant("g3", gpu=8))
    decision = attempt(facts(nodes=nodes, estimates=sized(gpu=6), tenants=full))
    assert (decision.node, decision.yields) == ("g2", ())


def test_the_fastest_start_counts_the_time_until_others_have_made_room() -> None:
    known = sized(gpu=6)
    for where, seconds in (("g1", 1.0), ("g2", 1.3)):
        known.took("qa", where, Work.RESTORE, seconds)
    nodes = {name: gpu_node(name) for name in ("g1", "g2")}
    held = (snapshot("s1", node="g1", device="cuda:0"), snapshot("s1", node="g2", device="cuda:0"))
    free = facts(nodes=nodes, snapshots=held, estimates=known)
    assert attempt(free).node == "g1"
    # A park of half a second costs more than the slower node.
    crowded = replace(free, tenants=around(tenant("g1", gpu=8)))
    assert attempt(crowded).node == "g2"
    quick = replace(free, tenants=around(tenant("g1", gpu=8, park_seconds=0.1)))
    decision = attempt(quick)
    assert decision.node == "g1"
    assert decision.seconds == pytest.approx(1.1)
    assert [one.instance for one in decision.yields] == ["other-on-g1"]
    assert "instances/other-on-g1 parks: it was not used for 1000 s" in decision.reason


def test_a_measured_cold_start_that_is_faster_than_a_restore_is_chosen() -> None:
    known = Estimates()
    known.took("qa", "n1", Work.START, 0.2)
    known.took("qa", "n1", Work.RESTORE, 0.9)
    assert attempt(facts(snapshots=(snapshot(),), estimates=known)).tier is Tier.COLD


def test_a_snapshot_elsewhere_is_fetched_if_its_node_has_no_room() -> None:
    nodes = {"n1": node(instance_memory_limit_bytes=10 * GIB), "n2": node(identifier="n2")}
    copies = (snapshot(published=True), snapshot(node="n2", local=False, published=True))
    known = facts(nodes=nodes, snapshots=copies, estimates=sized(ram=4))
    assert attempt(known).node == "n1"
    busy = replace(known, tenants=around(tenant("n1", ram=8, in_flight=1)))
    assert (attempt(busy).tier, attempt(busy).node) == (Tier.REMOTE, "n2")


@pytest.mark.parametrize(
    "small", [{"snapshot_limit_bytes": GIB}, {"disk_free_bytes": GIB}], ids=["budget", "disk"]
)
def test_a_snapshot_is_not_fetched_to_a_disk_without_room_for_it(small: dict[str, Any]) -> None:
    remote = snapshot(local=False, published=True, size_bytes=2 * GIB)
    assert attempt(facts(snapshots=(remote,))).tier is Tier.REMOTE
    assert attempt(facts(snapshots=(remote,), nodes={"n1": node(**small)})).tier is Tier.COLD


def test_where_all_are_in_use_a_start_waits_for_room_and_says_who_holds_it() -> None:
    known = facts(
        nodes={"g1": gpu_node()}, estimates=sized(gpu=6), tenants=around(tenant("g1", gpu=8, in_flight=3))
    )
    decision = decide(known, NOW)
    assert isinstance(decision, Wait)
    assert decision.room
    assert decision.until is not None
    assert "instances/other-on-g1 is in use and has priority 0, which is not below 0" in decision.reason


def test_a_higher_priority_takes_the_room_of_one_that_is_in_use() -> None:
    urgent = replace(deployment(), priority=5)
    known = facts(
        deployment=urgent,
        nodes={"g1": gpu_node()},
        estimates=sized(gpu=6),
        tenants=around(tenant("g1", gpu=8, in_flight=3)),
    )
    (one,) = attempt(known).yields
    assert (one.instance, one.drains) == ("other-on-g1", True)
    assert "its priority is 0, below 5" in one.reason


def test_what_is_too_large_for_every_node_is_refused_at_once() -> None:
    with pytest.raises(ResourceExhausted) as refusal:
        decide(facts(nodes={"g1": gpu_node(total=4)}, estimates=sized(gpu=6)), NOW)
    assert refusal.value.reason == "NO_ROOM"
    assert "it needs 6144 MiB of GPU memory" in refusal.value.message


def test_a_parked_instance_without_room_on_its_gpu_is_left_for_a_snapshot_elsewhere() -> None:
    parked = instance(InstanceState.PARKED, node="g1")
    parked = replace(parked, report=replace(parked.report, gpu="GPU-g1", gpu_bytes=6 * GIB))
    nodes = {name: gpu_node(name) for name in ("g1", "g2")}
    known = facts(
        nodes=nodes,
        instances=(parked,),
        snapshots=(snapshot(node="g2", device="cuda:0", gpu_bytes=6 * GIB),),
    )
    assert attempt(known).tier is Tier.PARKED
    full = replace(known, tenants=around(tenant("g1", gpu=8, in_flight=1)))
    assert (attempt(full).tier, attempt(full).node) == (Tier.LOCAL, "g2")


def test_a_parked_instance_is_resumed_however_large_its_kv_cache_was() -> None:
    parked = instance(InstanceState.PARKED, node="g1")
    parked = replace(parked, report=replace(parked.report, gpu="GPU-g1", gpu_bytes=40 * GIB))
    known = Estimates()
    known.took("qa", "g1", Work.RESTORE, 0.4)
    found = facts(
        deployment=replace(deployment(), weights_bytes=GIB),
        nodes={"g1": gpu_node("g1", total=64)},
        instances=(parked,),
        snapshots=(snapshot(node="g1", device="cuda:0"),),
        estimates=known,
    )

    assert attempt(found).tier is Tier.PARKED


def test_another_instance_is_started_beside_those_that_serve() -> None:
    serving = instance(InstanceState.SERVING, served=True)
    parked = instance(InstanceState.PARKED, "qa-2")
    known = facts(instances=(serving, parked), snapshots=(snapshot(),), another=True)
    assert attempt(known).instance == "qa-2"
    assert attempt(replace(known, instances=(serving,))).tier is Tier.LOCAL


def test_every_possible_start_is_explained_the_chosen_one_first() -> None:
    nodes = {name: gpu_node(name) for name in ("g1", "g2")}
    known = facts(
        nodes=nodes,
        snapshots=(snapshot(node="g1", device="cuda:0"),),
        estimates=sized(gpu=6),
        tenants=around(tenant("g2", gpu=8, in_flight=1)),
    )
    found = explain(known, NOW)
    assert [(one.tier, one.node) for one in found] == [
        (Tier.LOCAL, "g1"),
        (Tier.COLD, "g1"),
        (Tier.COLD, "g2"),
    ]
    chosen = attempt(known)
    assert (found[0].tier, found[0].node, found[0].seconds) == (chosen.tier, chosen.node, chosen.seconds)
    assert isinstance(found[2].room, NoRoom)

"""Who yields to whom, and how: every case as a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.model import Gpu, Instance, InstanceState, Node, NodeState, Report
from controller.room import ACTIVE_SECONDS, How, Need, NoRoom, Room, Tenant, find, reclaim

NOW = 1000.0
LONG_AGO = NOW - 10 * ACTIVE_SECONDS
GIB = 1 << 30
GPU = "GPU-a"


def node(*gpus: Gpu, **facts: Any) -> Node:
    known = Node("n1", "x:1", state=NodeState.READY, checkpoint_capable=True, gpus=gpus)
    return replace(known, **facts)


def tenant(
    name: str,
    *,
    gpu: int = 0,
    ram: int = 0,
    on: str = GPU,
    state: InstanceState = InstanceState.SERVING,
    idle_since: float = LONG_AGO,
    since: float = LONG_AGO,
    in_flight: int = 0,
    busy: bool = False,
    **facts: Any,
) -> Tenant:
    report = Report(name, name, state, gpu=on if gpu else "", gpu_bytes=gpu * GIB, ram_bytes=ram * GIB)
    instance = Instance("n1", state, report, since, idle_since, in_flight=in_flight, busy=busy)
    return Tenant(instance, **{"parked_bytes": ram * GIB, "park_seconds": 0.5, "stop_seconds": 0.2} | facts)


def yields(found: Room | NoRoom) -> dict[str, How]:
    assert isinstance(found, Room), found
    return {one.instance: one.how for one in found.yields}


ONE_GPU = node(Gpu(GPU, "H", 10 * GIB))


def gpu_room(*tenants: Tenant, need: int = 6, priority: int = 0, where: Node = ONE_GPU) -> Room | NoRoom:
    return find(where, tenants, Need("new", priority, gpu_bytes=need * GIB), NOW)


def test_nobody_yields_where_there_is_room() -> None:
    found = gpu_room(tenant("a", gpu=4))
    assert (yields(found), found.gpu) == ({}, GPU)  # type: ignore[union-attr]


def test_an_idle_instance_is_parked_for_anyone_and_a_busy_one_is_not() -> None:
    assert yields(gpu_room(tenant("a", gpu=6))) == {"a": How.PARK}
    refused = gpu_room(tenant("a", gpu=6, in_flight=1))
    assert isinstance(refused, NoRoom)
    assert "instances/a is in use and has priority 0" in refused.reason
    assert not refused.never


@pytest.mark.parametrize(
    ("mine", "theirs", "serving_for", "expected"),
    [
        (1, 0, ACTIVE_SECONDS, {"a": How.PARK}),
        (1, 1, ACTIVE_SECONDS, None),
        (0, 1, ACTIVE_SECONDS, None),
        (1, 0, ACTIVE_SECONDS - 1, None),
    ],
    ids=["higher", "equal", "lower", "higher, within its active time"],
)
@pytest.mark.parametrize(
    "use", [{"in_flight": 2}, {"kept": True}, {"wanted": True}], ids=["busy", "kept", "wanted"]
)
def test_one_in_use_yields_only_to_a_strictly_higher_priority_and_not_at_once(
    mine: int, theirs: int, serving_for: float, expected: dict[str, How] | None, use: dict[str, Any]
) -> None:
    there = tenant("a", gpu=6, priority=theirs, since=NOW - serving_for, **use)
    found = gpu_room(there, priority=mine)
    assert (None if isinstance(found, NoRoom) else yields(found)) == expected
    if isinstance(found, Room):
        assert found.yields[0].drains is bool(there.instance.in_flight)


@pytest.mark.parametrize(
    "unwilling",
    [
        {"state": InstanceState.CAPTURING},
        {"state": InstanceState.STARTING},
        {"busy": True},
        {"ours": False},
    ],
    ids=["captures", "starts", "under a command", "somebody else's"],
)
def test_nobody_takes_from_one_that(unwilling: dict[str, Any]) -> None:
    assert isinstance(gpu_room(tenant("a", gpu=6, **unwilling), priority=1000), NoRoom)


def test_a_deployment_takes_nothing_from_itself() -> None:
    assert isinstance(gpu_room(tenant("new", gpu=6)), NoRoom)


def test_the_least_recently_used_and_the_cheapest_to_bring_back_yields_first() -> None:
    old = tenant("old", gpu=6, idle_since=NOW - 600, resume_seconds=1.0)
    recent = tenant("recent", gpu=6, idle_since=NOW - 60, resume_seconds=1.0)
    assert yields(gpu_room(old, recent, where=node(Gpu(GPU, "H", 12 * GIB)))) == {"old": How.PARK}
    dear = tenant("dear", gpu=6, idle_since=NOW - 600, resume_seconds=60.0)
    assert yields(gpu_room(dear, recent, where=node(Gpu(GPU, "H", 12 * GIB)))) == {"recent": How.PARK}


def test_an_idle_one_yields_before_one_of_a_lower_priority_that_is_in_use() -> None:
    idle = tenant("idle", gpu=6, priority=5, idle_since=NOW - 1, resume_seconds=100.0)
    used = tenant("used", gpu=6, priority=0, in_flight=1)
    assert yields(gpu_room(idle, used, priority=9, where=node(Gpu(GPU, "H", 12 * GIB)))) == {"idle": How.PARK}


def test_no_more_yield_than_must() -> None:
    small = tenant("small", gpu=1, idle_since=NOW - 900)
    large = tenant("large", gpu=8, idle_since=NOW - 60)
    assert yields(gpu_room(small, large)) == {"large": How.PARK}


def test_the_gpu_is_taken_where_least_is_lost() -> None:
    two = node(Gpu(GPU, "H", 10 * GIB), Gpu("GPU-b", "H", 10 * GIB))
    dear = tenant("dear", gpu=6, resume_seconds=30.0)
    cheap = tenant("cheap", gpu=6, on="GPU-b", resume_seconds=1.0)
    found = gpu_room(dear, cheap, where=two)
    assert yields(found) == {"cheap": How.PARK}
    assert isinstance(found, Room)
    assert found.gpu == "GPU-b"


def test_of_two_gpus_with_room_the_one_with_more_free_memory_is_taken() -> None:
    two = node(Gpu(GPU, "H", 10 * GIB), Gpu("GPU-b", "H", 10 * GIB))
    found = gpu_room(tenant("a", gpu=2), where=two)
    assert isinstance(found, Room)
    assert (found.gpu, found.yields) == ("GPU-b", ())


def test_a_parked_instance_goes_home_if_there_is_room_and_only_to_a_gpu_of_that_kind() -> None:
    three = node(Gpu(GPU, "H", 10 * GIB), Gpu("GPU-b", "H", 10 * GIB), Gpu("GPU-c", "L", 90 * GIB))
    need = Need("new", 0, gpu_bytes=6 * GIB, home=GPU, instance="me")
    found = find(three, (tenant("a", gpu=2),), need, NOW)
    assert isinstance(found, Room)
    assert found.gpu == GPU
    full = (tenant("a", gpu=6, in_flight=1), tenant("b", gpu=6, on="GPU-b", in_flight=1))
    assert isinstance(find(three, full, need, NOW), NoRoom)
    found = find(three, full[:1], need, NOW)
    assert isinstance(found, Room)
    assert found.gpu == "GPU-b"


def test_memory_of_a_gpu_that_is_not_ours_is_no_room() -> None:
    shared = node(Gpu(GPU, "H", 10 * GIB, other_bytes=5 * GIB))
    refused = gpu_room(where=shared)
    assert isinstance(refused, NoRoom)
    assert refused.never
    assert "5120 MiB are not Dumont's" in refused.reason


def test_an_instance_that_cannot_be_parked_ends_instead() -> None:
    refuses = tenant("a", gpu=6)
    refuses = replace(refuses, instance=replace(refuses.instance, park_refused=True))
    assert yields(gpu_room(refuses)) == {"a": How.STOP}
    incapable = replace(ONE_GPU, checkpoint_capable=False)
    assert yields(gpu_room(tenant("a", gpu=6), where=incapable)) == {"a": How.STOP}


# Memory


def ram_room(
    *tenants: Tenant, need: int = 4, limit: int = 10, parked: int = 0, priority: int = 0
) -> Room | NoRoom:
    where = node(instance_memory_limit_bytes=limit * GIB, parked_memory_limit_bytes=parked * GIB)
    return find(where, tenants, Need("new", priority, ram_bytes=need * GIB), NOW)


def test_a_park_frees_no_memory_so_an_idle_instance_ends() -> None:
    assert yields(ram_room(tenant("a", ram=6), need=4)) == {}
    assert yields(ram_room(tenant("a", ram=7), need=4)) == {"a": How.STOP}


def test_a_parked_instance_ends_before_one_that_serves() -> None:
    parked = tenant("parked", ram=4, state=InstanceState.PARKED, idle_since=NOW - 1)
    serving = tenant("serving", ram=4, idle_since=NOW - 900)
    assert yields(ram_room(parked, serving)) == {"parked": How.STOP}


def test_a_parked_instance_that_is_wanted_yields_only_to_a_higher_priority() -> None:
    parked = tenant("parked", ram=8, state=InstanceState.PARKED, wanted=True)
    assert isinstance(ram_room(parked), NoRoom)
    assert yields(ram_room(parked, priority=1)) == {"parked": How.STOP}


def test_no_more_end_than_must() -> None:
    small = tenant("small", ram=1, idle_since=NOW - 900)
    large = tenant("large", ram=7, idle_since=NOW - 60)
    assert yields(ram_room(small, large, need=3)) == {"small": How.STOP}
    assert yields(ram_room(small, large, need=8)) == {"large": How.STOP}


def test_what_is_larger_than_the_budget_never_fits() -> None:
    refused = ram_room(need=11)
    assert isinstance(refused, NoRoom)
    assert refused.never


def test_without_a_limit_everything_fits() -> None:
    assert yields(ram_room(tenant("a", ram=100), need=100, limit=0)) == {}


def both(*tenants: Tenant, limit: int = 0, parked: int = 0) -> Room | NoRoom:
    where = node(
        Gpu(GPU, "H", 10 * GIB),
        instance_memory_limit_bytes=limit * GIB,
        parked_memory_limit_bytes=parked * GIB,
    )
    return find(where, tenants, Need("new", 0, gpu_bytes=6 * GIB, ram_bytes=1 * GIB), NOW)


def test_a_victim_for_whose_parked_memory_there_is_no_room_ends() -> None:
    victim = tenant("a", gpu=6, ram=1, parked_bytes=4 * GIB)
    assert yields(both(victim, limit=10, parked=5)) == {"a": How.PARK}
    assert yields(both(victim, limit=10, parked=3)) == {"a": How.STOP}
    assert yields(both(victim, limit=4)) == {"a": How.STOP}


def test_an_older_parked_instance_ends_so_that_the_victim_can_be_parked() -> None:
    victim = tenant("victim", gpu=6, ram=1, parked_bytes=3 * GIB)
    parked = tenant("parked", gpu=6, ram=3, state=InstanceState.PARKED)
    found = both(victim, parked, limit=20, parked=5)
    assert yields(found) == {"parked": How.STOP, "victim": How.PARK}
    assert isinstance(found, Room)
    # The memory must be free before the park needs it.
    assert [one.instance for one in found.yields] == ["parked", "victim"]
    assert found.seconds == pytest.approx(0.7)


def test_a_parked_instance_that_resumes_needs_no_memory_that_it_has_already() -> None:
    me = tenant("me", gpu=6, ram=9, state=InstanceState.PARKED)
    where = node(Gpu(GPU, "H", 10 * GIB), instance_memory_limit_bytes=10 * GIB)
    other = tenant("other", gpu=6, ram=1)
    need = Need("me", 0, gpu_bytes=6 * GIB, instance="me")
    found = find(where, (me, other), need, NOW)
    assert yields(found) == {"other": How.PARK}


def test_why_says_what_yields_and_why() -> None:
    found = gpu_room(tenant("a", gpu=6, idle_since=NOW - 42, resume_seconds=0.4))
    assert isinstance(found, Room)
    assert found.yields[0].reason == "instances/a parks: it was not used for 42 s, and it is back in 0.4 s"


# Parked memory


def test_a_parked_instance_resumes_though_instances_have_outgrown_the_limit() -> None:
    home = tenant("home", gpu=2, ram=8, state=InstanceState.PARKED)
    where = node(Gpu(GPU, "H", 10 * GIB), instance_memory_limit_bytes=10 * GIB)
    need = Need("home", gpu_bytes=2 * GIB, home=GPU, instance="home")
    busy = tenant("busy", ram=4, in_flight=1)
    assert yields(find(where, [home, busy], need, NOW)) == {}
    # A new one finds no room there.
    assert isinstance(
        find(where, [busy, replace(home, wanted=True)], Need("new", ram_bytes=GIB), NOW), NoRoom
    )


def parked(name: str, ram: int, idle: float = 100.0, **facts: Any) -> Tenant:
    return tenant(name, ram=ram, state=InstanceState.PARKED, idle_since=NOW - idle, **facts)


def reclaimed(*tenants: Tenant, limit: int = 10, total: int = 100, available: int = 50) -> list[str]:
    where = node(
        parked_memory_limit_bytes=limit * GIB,
        memory_total_bytes=total * GIB,
        memory_available_bytes=available * GIB,
    )
    return [one.instance for one in reclaim(where, tenants, NOW)]


def test_parked_instances_within_their_budget_stay() -> None:
    assert reclaimed(parked("a", 6), parked("b", 4)) == []
    assert reclaimed(parked("a", 60), limit=0) == []


def test_beyond_the_budget_those_end_whose_loss_is_least() -> None:
    assert reclaimed(parked("a", 6, idle=10), parked("b", 6, idle=500)) == ["b"]
    assert reclaimed(parked("a", 6, idle=10), parked("b", 6, idle=500, back_seconds=900.0)) == ["a"]


def test_when_the_node_runs_short_of_memory_parked_ones_end() -> None:
    assert reclaimed(parked("a", 6), parked("b", 1), limit=0, available=4) == ["a"]
    assert reclaimed(parked("a", 6), tenant("s", ram=90), limit=0, available=5) == []


@pytest.mark.parametrize("keep", [{"ours": False}, {"wanted": True}, {"busy": True}])
def test_no_memory_is_taken_from_a_parked_instance_that(keep: dict[str, Any]) -> None:
    assert reclaimed(parked("a", 60, **keep), available=0) == []

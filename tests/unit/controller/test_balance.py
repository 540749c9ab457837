"""What leaves a draining node, how many at a time, and what is said of the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.balance import EVACUATIONS, IDLE, plan_balance, plan_drain, remainder
from controller.model import Gpu, Instance, InstanceState, Node, NodeState
from tests.unit.controller.test_policy import NOW, instance, node, snapshot

DRAINING = node(draining=True, object_store="s3://bucket")
UNDER_WAY = float("inf")


def planned(*instances: Instance, on: Any = DRAINING, **facts: Any) -> list[str]:
    """The kinds and ids of the actions."""
    held = facts.pop("held", ())
    owned = facts.pop("owned", {i.id for i in instances})
    actions = plan_drain(on, instances, held, owned, facts.pop("retry_at", {}), NOW)
    return [f"{type(action).__name__} {action.id}" for action in actions]


@pytest.mark.parametrize("state", list(InstanceState))
def test_what_serves_or_is_parked_leaves_and_what_failed_is_stopped(state: InstanceState) -> None:
    expected = {
        InstanceState.SERVING: ["Evacuate a"],
        InstanceState.PARKED: ["Evacuate a"],
        InstanceState.FAILED: ["Stop a"],
    }
    assert planned(instance(state, "a")) == expected.get(state, [])


@pytest.mark.parametrize(
    ("on", "changes", "owned"),
    [
        (replace(DRAINING, draining=False), {}, {"a"}),
        (replace(DRAINING, state=NodeState.CONNECTING), {}, {"a"}),
        (replace(DRAINING, state=NodeState.UNREACHABLE), {}, {"a"}),
        (DRAINING, {"busy": True}, {"a"}),
        (DRAINING, {"draining": True}, {"a"}),
        (DRAINING, {}, set()),
    ],
    ids=["not draining", "connecting", "unreachable", "busy", "leaving", "an orphan"],
)
def test_nothing_is_planned_for(on: Any, changes: dict[str, Any], owned: set[str]) -> None:
    assert planned(instance(InstanceState.SERVING, "a", **changes), on=on, owned=owned) == []


def test_a_few_leave_at_a_time_and_a_failure_waits_for_its_turn() -> None:
    many = [instance(InstanceState.SERVING, f"i{number}") for number in range(EVACUATIONS + 3)]
    assert len(planned(*many)) == EVACUATIONS
    retry = {"instances/i0/node": UNDER_WAY, "instances/i1/node": NOW + 5.0}
    assert planned(*many, retry_at=retry) == [f"Evacuate i{n}" for n in range(2, EVACUATIONS + 1)]


def test_one_that_only_answers_its_last_requests_delays_no_other() -> None:
    leaving = [instance(InstanceState.SERVING, f"l{n}", draining=True) for n in range(EVACUATIONS)]
    retry = {f"instances/{i.id}/node": UNDER_WAY for i in leaving}
    assert planned(*leaving, instance(InstanceState.SERVING, "a"), retry_at=retry) == ["Evacuate a"]


@pytest.mark.parametrize(
    ("changes", "actions"),
    [
        ({}, ["Publish s1"]),
        ({"published": True}, []),
        ({"owner": None}, []),
        ({"quarantined": True}, []),
    ],
)
def test_a_snapshot_that_only_this_node_holds_is_published(
    changes: dict[str, Any], actions: list[str]
) -> None:
    assert planned(held=(snapshot(**changes),)) == actions
    assert planned(held=(snapshot(**changes),), on=replace(DRAINING, object_store="")) == []


def test_of_what_is_left_it_is_told_why() -> None:
    left = (
        instance(InstanceState.SERVING, "foreign"),
        instance(InstanceState.SERVING, "busy", in_flight=2, draining=True),
        instance(InstanceState.SERVING, "refused"),
        instance(InstanceState.STARTING, "new"),
    )
    told = remainder(left, {"busy", "refused", "new"}, {"refused": ("NO_NODE", "no node takes starts")})
    assert [(one.instance, one.reason) for one in told] == [
        ("foreign", "ORPHAN"),
        ("busy", "INSTANCE_BUSY"),
        ("refused", "NO_NODE"),
        ("new", "UNDER_WAY"),
    ]
    assert told[1].message == "it answers 2 requests and ends after them"


# Balance

A, B = Gpu("GPU-a", "H", 100), Gpu("GPU-b", "H", 100)
TWO_GPUS = node(gpus=(A, B))


def on_gpu(identifier: str, size: int, gpu: Gpu = A, **changes: Any) -> Instance:
    idle = instance(InstanceState.SERVING, identifier, **changes)
    report = replace(idle.report, gpu=gpu.uuid, gpu_bytes=size)
    return replace(idle, report=report, idle_since=changes.get("idle_since", NOW - IDLE))


def moved(*instances: Instance, on: Node = TWO_GPUS, others: tuple[tuple[Node, int], ...] = ()) -> Any:
    """What is moved and to where; None: nothing."""
    owned = {i.id for i in instances if i.id != "foreign"}
    action = plan_balance(on, instances, owned, lambda: others, NOW)
    return action and (action.instance, action.gpu or action.node)


@pytest.mark.parametrize(
    ("instances", "move"),
    [
        ((on_gpu("a", 40), on_gpu("b", 40)), ("a", "GPU-b")),
        # The one that makes both most alike.
        ((on_gpu("a", 60), on_gpu("b", 40)), ("b", "GPU-b")),
        ((on_gpu("a", 50), on_gpu("b", 20), on_gpu("c", 10)), ("a", "GPU-b")),
        ((on_gpu("a", 30), on_gpu("b", 60, B)), None),
        # Little is gained where both are nearly alike, or where one instance is all there is.
        ((on_gpu("a", 40), on_gpu("b", 20, B)), None),
        ((on_gpu("a", 60),), None),
        # Of two that gain as much, the smaller one.
        ((on_gpu("a", 60), on_gpu("b", 30)), ("b", "GPU-b")),
        ((on_gpu("a", 45), on_gpu("b", 5)), ("b", "GPU-b")),
        ((on_gpu("a", 48), on_gpu("b", 2)), None),
        ((), None),
    ],
)
def test_an_idle_instance_goes_from_a_crowded_gpu_to_an_emptier_one(
    instances: tuple[Instance, ...], move: tuple[str, str] | None
) -> None:
    assert moved(*instances) == move


@pytest.mark.parametrize("sizes", [(40, 40), (60, 30), (50, 20, 10), (45, 5), (30, 30, 30)])
def test_after_the_moves_nothing_moves_back(sizes: tuple[int, ...]) -> None:
    known = {f"i{number}": on_gpu(f"i{number}", size) for number, size in enumerate(sizes)}
    moves = 0
    while (move := moved(*known.values())) is not None:
        name, gpu = move
        known[name] = replace(known[name], report=replace(known[name].report, gpu=gpu))
        moves += 1
        assert moves <= len(sizes)
    assert moves >= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"in_flight": 1},
        {"busy": True},
        {"draining": True},
        {"idle_since": NOW - IDLE + 1},
    ],
)
def test_what_is_in_use_stays(changes: dict[str, Any]) -> None:
    assert moved(on_gpu("a", 40, **changes), on_gpu("b", 40, in_flight=1)) is None


def test_an_orphan_stays_and_counts() -> None:
    assert moved(on_gpu("foreign", 40), on_gpu("b", 40)) == ("b", "GPU-b")
    assert moved(on_gpu("foreign", 40)) is None


@pytest.mark.parametrize(
    "on",
    [
        replace(TWO_GPUS, draining=True),
        replace(TWO_GPUS, checkpoint_capable=False),
        replace(TWO_GPUS, state=NodeState.CONNECTING),
        replace(TWO_GPUS, gpus=(A,)),
        replace(TWO_GPUS, gpus=(A, replace(B, model="L"))),
        replace(TWO_GPUS, gpus=(A, replace(B, other_bytes=70))),
    ],
    ids=["draining", "cannot suspend", "connecting", "one GPU", "another model", "in use by others"],
)
def test_nothing_moves_where_it_cannot(on: Node) -> None:
    assert moved(on_gpu("a", 40), on_gpu("b", 40), on=on) is None


def test_from_a_full_node_an_idle_instance_goes_to_one_that_is_half_empty() -> None:
    full = (on_gpu("a", 40), on_gpu("b", 35), on_gpu("c", 20))
    one = node(gpus=(A,))
    empty, emptier = node(identifier="n2", gpus=(A,)), node(identifier="n3", gpus=(A,))
    assert moved(*full, on=one, others=((empty, 8), (emptier, 5))) == ("a", "n3")
    # It would not be half empty with it.
    assert moved(*full, on=one, others=((empty, 30),)) is None
    assert moved(on_gpu("a", 40), on_gpu("b", 40), on=one, others=((emptier, 0),)) is None
    assert moved(*full, on=one, others=((replace(emptier, gpus=()), 0),)) is None

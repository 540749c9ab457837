"""What leaves a draining node, how many at a time, and what is said of the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.balance import EVACUATIONS, plan_drain, remainder
from controller.model import Instance, InstanceState, NodeState
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

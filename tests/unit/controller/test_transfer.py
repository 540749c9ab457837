"""How an instance can be brought to another node: what the target holds x the store x the source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.model import Checkpoint, Finding, InstanceState, Node, NodeState, Snapshot, Weights
from controller.transfer import Facts, Way, find
from dumont.errors import DumontError, FailedPrecondition, Unavailable
from tests.unit.controller.test_policy import deployment, instance, node, snapshot

STORE = "s3://bucket"
# On the source only, in the store, and on the target.
HELD = snapshot("held", create_time=30.0)
SEEN = snapshot("shared", node="n2", create_time=20.0, local=False, published=True)
THERE = snapshot("there", node="n2", create_time=10.0)


def nodes(**changes: Any) -> dict[str, Node]:
    both = {name: node(identifier=name, object_store=STORE) for name in ("n1", "n2")}
    return both | {name: replace(both[name], **change) for name, change in changes.items()}


def facts(*snapshots: Snapshot, **known: Any) -> Facts:
    among = known.pop("nodes", nodes())
    plain = Facts(deployment(), instance(InstanceState.SERVING), among["n2"], among, snapshots)
    return replace(plain, **known)


def served(**changes: Any) -> Any:
    return instance(InstanceState.SERVING, served=True, **changes)


@pytest.mark.parametrize(
    ("snapshots", "way"),
    [
        ((HELD, SEEN, THERE), ("there", False, False)),
        ((HELD, SEEN), ("shared", False, False)),
        ((HELD,), ("held", True, False)),
        ((), ("", False, True)),
        ((replace(HELD, quarantined=True),), ("", False, True)),
        ((replace(HELD, owner=None),), ("", False, True)),
        ((replace(HELD, weights=Weights.INCLUDED),), ("", False, True)),
    ],
    ids=["on the target", "in the store", "to publish", "none", "quarantined", "an orphan", "other weights"],
)
def test_the_cheapest_way_there_is(snapshots: tuple[Snapshot, ...], way: tuple[str, bool, bool]) -> None:
    found = find(facts(*snapshots))
    assert (found.snapshot, found.publish, found.capture) == way


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"instance": served()}, "INSTANCE_SERVED"),
        ({"instance": instance(InstanceState.PARKED)}, "INSTANCE_NOT_SERVING"),
        ({"deployment": replace(deployment(), checkpoint=Checkpoint(False))}, "CHECKPOINT_DISABLED"),
        (
            {"deployment": replace(deployment(), checkpoint=Checkpoint(True, weights=Weights.INCLUDED))},
            "WEIGHTS_DIFFER",
        ),
        ({"nodes": nodes(n1={"checkpoint_capable": False})}, "NODE_NOT_CAPABLE"),
        ({"nodes": nodes(n2={"object_store": ""})}, "NO_SHARED_STORE"),
        ({"nodes": nodes(n2={"object_store": "s3://other"})}, "NO_SHARED_STORE"),
        ({"nodes": nodes(n1={"object_store": ""}, n2={"object_store": ""})}, "NO_SHARED_STORE"),
        (
            {"nodes": nodes(n2={"checkpoint_capable": False, "findings": (Finding("criu", False, "none"),)})},
            "NODE_NOT_CAPABLE",
        ),
    ],
)
def test_where_nothing_can_be_brought_it_is_refused_by_name_or_loaded_again(
    known: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FailedPrecondition, match="--cold") as refusal:
        find(facts(**known))
    assert refusal.value.reason == reason
    cold = find(facts(**known, cold=True))
    assert cold == Way(cold.reason)
    assert cold.reason.startswith("the model is loaded again: ")


def test_a_snapshot_that_the_target_cannot_restore_is_told_and_not_published_for_it() -> None:
    different = replace(SEEN, incompatibility="its kernel differs")
    with pytest.raises(FailedPrecondition, match="its kernel differs") as refusal:
        find(facts(replace(HELD, id=different.id, published=True), different))
    assert refusal.value.reason == "INCOMPATIBLE"


@pytest.mark.parametrize("state", [NodeState.CONNECTING, NodeState.UNREACHABLE])
def test_nothing_is_brought_to_a_node_that_does_not_answer(state: NodeState) -> None:
    with pytest.raises(Unavailable) as refusal:
        find(facts(THERE, nodes=nodes(n2={"state": state}), cold=True))
    assert refusal.value.reason == "NODE_UNAVAILABLE"


def test_what_stays_on_a_node_that_is_away_is_not_published() -> None:
    away = nodes() | {"n3": node(NodeState.UNREACHABLE, "n3", object_store=STORE)}
    with pytest.raises(DumontError) as refusal:
        find(facts(replace(HELD, node="n3"), instance=served(), nodes=away))
    assert refusal.value.reason == "INSTANCE_SERVED"

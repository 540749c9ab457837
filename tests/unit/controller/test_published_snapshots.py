"""Snapshots in the object store, as the controller uses, publishes, distrusts and deletes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.model import Captured, Snapshot, StartMode, Storage, Tier
from controller.policy import Attempt, Facts, decide
from dumont.errors import DataLoss, FailedPrecondition, Unavailable
from tests.unit.controller.controller_world import World
from tests.unit.controller.test_policy import NOW, deployment, node, snapshot

SHARED: dict[str, Any] = {"local": False, "published": True, "owner": "u"}


def facts(*snapshots: Snapshot, mode: StartMode = StartMode.CHECKPOINT, **known: Any) -> Facts:
    nodes = {name: node(identifier=name, object_store="s3://bucket") for name in ("n1", "n2")}
    return replace(Facts(deployment(mode), (), snapshots, nodes), **known)


def chosen(known: Facts) -> Attempt:
    decision = decide(known, NOW)
    assert isinstance(decision, Attempt)
    return decision


# Which tier


def test_a_snapshot_on_a_node_comes_before_one_in_the_store() -> None:
    older = snapshot("s1")
    newer = snapshot("s2", node="n2", create_time=99.0, **SHARED)
    assert (chosen(facts(older, newer)).tier, chosen(facts(older, newer)).snapshot) == (Tier.LOCAL, "s1")


def test_a_published_one_is_restored_on_the_node_with_most_memory_among_those_that_reach_it() -> None:
    known = facts(snapshot(node="n1", **SHARED), snapshot(node="n2", **SHARED))
    nodes = {**known.nodes, "n2": replace(known.nodes["n2"], memory_available_bytes=1 << 40)}
    decision = chosen(replace(known, nodes=nodes))
    assert (decision.tier, decision.node, decision.snapshot) == (Tier.REMOTE, "n2", "s1")
    assert not decision.capture


@pytest.mark.parametrize(
    "change",
    [
        {"owner": None},
        {"quarantined": True, "quarantine_reason": "CHUNK_DAMAGED: a chunk"},
        {"incompatibility": "its kernel differs"},
    ],
    ids=["another controller made it", "quarantined", "incompatible"],
)
def test_a_published_one_is_not_restored_when(change: dict[str, Any]) -> None:
    decision = chosen(facts(snapshot(**{**SHARED, **change})))
    assert decision.tier is Tier.COLD
    assert decision.capture


def test_a_cold_start_says_which_snapshot_is_quarantined_and_why() -> None:
    bad = snapshot(**SHARED, quarantined=True, quarantine_reason="CHUNK_DAMAGED: a chunk")
    assert "snapshots/s1 is quarantined on nodes/n1: CHUNK_DAMAGED" in chosen(facts(bad)).reason


def test_other_start_modes_use_no_published_snapshot() -> None:
    assert chosen(facts(snapshot(**SHARED), mode=StartMode.COLD)).tier is Tier.COLD


# From deploying to deleting


@pytest.fixture
async def two_nodes(world: World) -> World:
    """Two nodes with one store, and a deployment that keeps its snapshots there."""
    for name in ("n1", "n2"):
        await world.node(name, object_store="s3://bucket")
    await world.deploy(checkpoint_storage=Storage.S3)
    return world


async def published(world: World) -> str:
    """The deployment has served, and its snapshot is in the store."""
    await world.ask()
    await world.until(lambda: bool(world.nodes.bucket) and _settled(world))
    (snapshot,) = world.nodes.bucket
    return snapshot


def _settled(world: World) -> bool:
    copies = [copy for key in world.nodes.bucket for copy in world.inventory.copies(key)]
    return len(copies) == 2 and all(copy.published for copy in copies)


async def test_no_storage_in_s3_without_a_node_that_has_one(world: World) -> None:
    await world.node()
    with pytest.raises(FailedPrecondition) as refusal:
        await world.deploy(checkpoint_storage=Storage.S3)
    assert refusal.value.reason == "OBJECT_STORE_NOT_CONFIGURED"
    assert refusal.value.field == "deployment.checkpoint.storage"


async def test_a_snapshot_is_published_once_and_every_node_knows(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    assert len(two_nodes.nodes.named("publish")) == 1
    (first, second) = sorted(two_nodes.inventory.copies(snapshot), key=lambda copy: not copy.local)
    assert (first.local, first.published, first.orphan) == (True, True, False)
    assert (second.local, second.published, second.orphan) == (False, True, False)


async def test_local_storage_is_never_published(world: World) -> None:
    await world.node("n1", object_store="s3://bucket")
    await world.deploy()
    await world.ask()
    assert world.nodes.named("publish") == []


async def test_when_the_capturing_node_is_gone_another_one_restores_from_the_store(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    (holder,) = [copy.node for copy in two_nodes.inventory.copies(snapshot) if copy.local]
    two_nodes.nodes.cut(holder)
    await two_nodes.controller.core.fleet.give_up(holder)

    info, _ = await two_nodes.ask()

    assert info.tier is Tier.REMOTE
    assert info.node != holder


async def test_an_older_snapshot_under_the_same_id_is_refused_by_its_digest(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    (holder,) = [copy.node for copy in two_nodes.inventory.copies(snapshot) if copy.local]
    (other,) = {"n1", "n2"} - {holder}
    two_nodes.nodes.bucket[snapshot] = replace(two_nodes.nodes.bucket[snapshot], manifest_digest="older")
    await two_nodes.controller.core.fleet.refresh_snapshots(other)

    (seen,) = [copy for copy in two_nodes.inventory.copies(snapshot) if copy.node == other]

    assert seen.quarantined
    assert seen.quarantine_reason.startswith("MANIFEST_REPLACED")


async def test_a_restore_names_the_digest_that_was_captured(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    (stored,) = (await two_nodes.registry.load()).captured
    owner = two_nodes.controller.core.deployments.get("qa").uid
    assert stored == Captured(
        snapshot, "qa", owner, two_nodes.nodes.bucket[snapshot].manifest_digest, stored.node
    )


async def test_deleting_a_deployment_empties_the_store_too(two_nodes: World) -> None:
    await published(two_nodes)
    await two_nodes.controller.core.deployments.begin_delete("qa")
    await two_nodes.until(lambda: "qa" not in two_nodes.controller.core.deployments.by_id)
    assert two_nodes.nodes.bucket == {}
    assert (await two_nodes.registry.load()).captured == ()


async def test_what_another_controller_published_is_left_alone(two_nodes: World) -> None:
    theirs = Snapshot("theirs", "forgotten", "n1", 1.0)
    two_nodes.nodes.bucket["theirs"] = theirs
    await two_nodes.controller.core.fleet.refresh_snapshots("n1")
    two_nodes.controller.reconciler.step()
    assert "theirs" in two_nodes.inventory.snapshots
    assert two_nodes.nodes.named("delete_snapshot") == []


async def test_a_snapshot_that_no_reachable_node_knows_cannot_be_deleted_now(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    for name in ("n1", "n2"):
        two_nodes.nodes.cut(name)
        await two_nodes.controller.core.fleet.give_up(name)
    with pytest.raises(Unavailable):
        await two_nodes.controller.snapshots.delete(snapshot)
    assert snapshot in two_nodes.nodes.bucket


# Bringing it to a node


async def prefetched(world: World, snapshot: str, wanted: str = "") -> Snapshot:
    snapshots = world.controller.snapshots
    return await snapshots.prefetch(snapshot, snapshots.prefetch_node(snapshot, wanted))


async def test_once_it_was_brought_to_another_node_a_start_there_is_a_local_one(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    (holder,) = [copy.node for copy in two_nodes.inventory.copies(snapshot) if copy.local]
    (other,) = {"n1", "n2"} - {holder}

    await prefetched(two_nodes, snapshot, other)

    assert two_nodes.nodes.named("prefetch") == [("prefetch", other, snapshot)]
    two_nodes.nodes.cut(holder)
    await two_nodes.controller.core.fleet.give_up(holder)
    info, _ = await two_nodes.ask()
    assert (info.tier, info.node) == (Tier.LOCAL, other)


async def test_left_to_the_controller_it_goes_where_it_is_already_or_where_a_start_would_take_it(
    two_nodes: World,
) -> None:
    snapshot = await published(two_nodes)
    (holder,) = [copy.node for copy in two_nodes.inventory.copies(snapshot) if copy.local]
    (other,) = {"n1", "n2"} - {holder}
    assert (await prefetched(two_nodes, snapshot)).node == holder
    two_nodes.nodes.cut(holder)
    await two_nodes.controller.core.fleet.give_up(holder)
    assert (await prefetched(two_nodes, snapshot)).node == other


async def test_what_a_restore_would_refuse_is_brought_nowhere(two_nodes: World) -> None:
    theirs = Snapshot("theirs", "forgotten", "n1", 1.0)
    two_nodes.nodes.bucket["theirs"] = theirs
    await two_nodes.controller.core.fleet.refresh_snapshots("n1")
    with pytest.raises(FailedPrecondition) as refusal:
        await prefetched(two_nodes, "theirs")
    assert refusal.value.reason == "SNAPSHOT_OUT_OF_REACH"
    assert two_nodes.nodes.named("prefetch") == []


async def test_a_manifest_that_was_replaced_is_not_brought_and_known_as_such(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    (holder,) = [copy.node for copy in two_nodes.inventory.copies(snapshot) if copy.local]
    (other,) = {"n1", "n2"} - {holder}
    two_nodes.nodes.bucket[snapshot] = replace(two_nodes.nodes.bucket[snapshot], manifest_digest="older")
    with pytest.raises(DataLoss) as refusal:
        await prefetched(two_nodes, snapshot, other)
    assert refusal.value.reason == "MANIFEST_REPLACED"
    assert [copy.quarantined for copy in two_nodes.inventory.copies(snapshot) if copy.node == other] == [True]


async def test_a_prune_needs_a_node_with_a_store(world: World) -> None:
    await world.node()
    with pytest.raises(FailedPrecondition) as refusal:
        world.controller.snapshots.store_node()
    assert refusal.value.reason == "OBJECT_STORE_NOT_CONFIGURED"


# A store or a copy that is not as it was


async def test_a_silent_store_hides_nothing_and_its_node_is_asked_again(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    (holder,) = [copy.node for copy in two_nodes.inventory.copies(snapshot) if copy.local]
    other = "n2" if holder == "n1" else "n1"
    # given: a node that cannot list its store any more, and is asked what it holds
    two_nodes.nodes.store_silence = "the object store has not told all within 5 s"
    await two_nodes.controller.core.fleet.refresh_snapshots(other)
    assert [copy.node for copy in two_nodes.inventory.copies(snapshot) if not copy.local] == [other]
    # when: what the store has changes, and the store speaks again
    del two_nodes.nodes.bucket[snapshot]
    two_nodes.nodes.store_silence = ""
    await two_nodes.advance(10)
    # then: the controller knows without being told to ask
    assert [copy.node for copy in two_nodes.inventory.copies(snapshot)] == [holder]


async def test_a_damaged_copy_is_restored_from_the_store_in_the_same_start(two_nodes: World) -> None:
    snapshot = await published(two_nodes)
    (holder,) = [copy.node for copy in two_nodes.inventory.copies(snapshot) if copy.local]
    for instance in list(two_nodes.nodes.world[holder].instances):
        two_nodes.nodes.lose(holder, instance)
    await two_nodes.settle()
    # given: a copy whose node finds it damaged when it restores it, and offers that of the store from then on
    two_nodes.nodes.fail("restore", DataLoss("IMAGE_DAMAGED", "pages-1.img is not what it was"))
    del two_nodes.nodes.world[holder].snapshots[snapshot]
    info, _ = await two_nodes.ask()
    assert info.tier is Tier.REMOTE
    assert len(two_nodes.nodes.named("restore")) == 2
    assert two_nodes.nodes.named("start") == two_nodes.nodes.named("start")[:1]


async def test_each_object_store_is_pruned_by_one_of_its_nodes_by_itself(world: World) -> None:
    await world.controller.close()
    await world.boot(prune_every=3600)
    for name, store in (("n1", "s3://one"), ("n2", "s3://one"), ("n3", "s3://two"), ("n4", "")):
        await world.node(name, object_store=store)
    # When one of the stores refuses, the other one is pruned all the same, and both are the next time
    world.nodes.fail("prune", FailedPrecondition("PRUNE_BLOCKED", "a manifest cannot be read"))
    await world.advance(3700)
    await world.advance(3700)
    pruned = [node for _, node, _ in world.nodes.named("prune")]
    assert sorted(pruned) == ["n2", "n2", "n3", "n3"]


async def test_a_node_over_its_limit_loses_what_was_used_longest_ago(world: World) -> None:
    await world.node("n1")
    limited = replace(world.inventory.nodes["n1"], snapshot_limit_bytes=25)
    world.inventory.put_node(limited)
    for name in ("a", "b", "c"):
        await world.deploy(identifier=name)
        await world.ask(name)
        world.nodes.lose("n1", world.inventory.instances_of(name)[0].id)
        await world.advance(10)
    # Given that each of the snapshots takes ten bytes
    held = world.nodes.world["n1"].snapshots
    held.update({key: replace(value, size_bytes=10) for key, value in held.items()})
    await world.controller.core.fleet.refresh_snapshots("n1")
    await world.settle()
    assert sorted(snapshot.deployment for snapshot in held.values()) == ["b", "c"]
    assert world.inventory.held_bytes("n1") == 20


async def test_only_nodes_with_the_same_store_are_asked_what_was_published(world: World) -> None:
    for name, store in (("n1", "s3://one"), ("n2", "s3://one"), ("n3", "s3://other")):
        await world.node(name, object_store=store, memory=1 << 30 if name == "n1" else 1)
    await world.deploy()
    info, _ = await world.ask()
    assert info.node == "n1"
    world.nodes.calls.clear()

    await world.controller.snapshots.publish(next(iter(world.inventory.snapshots)))

    assert {node for _, node, _ in world.nodes.named("list_snapshots")} == {"n2"}


async def test_a_node_that_does_not_answer_does_not_spoil_what_another_one_publishes(world: World) -> None:
    await world.node("n1", object_store="s3://one")
    await world.node("n2", object_store="s3://one")
    await world.deploy()
    await world.ask()
    snapshot = next(iter(world.inventory.snapshots))
    world.nodes.fail("list_snapshots", Unavailable("NODE_UNAVAILABLE", "nodes/n2 does not answer"))

    await world.controller.snapshots.publish(snapshot)

    assert world.inventory.snapshot(snapshot).published

"""Snapshots that this controller did not have made: kept, adopted, deleted, brought back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.model import Snapshot, Storage, Tier
from dumont.errors import AlreadyExists, FailedPrecondition, NotFound
from tests.unit.controller.controller_world import World


@pytest.fixture
async def orphaned(world: World) -> World:
    """A node with a snapshot that no controller has written down."""
    node = world.nodes.add_node("n1")
    node.snapshots["old"] = Snapshot(
        "old", "qa", "n1", 1.0, model="org/model", engine="causal_lm", manifest_digest="abc"
    )
    await world.node()
    return world


async def test_an_adopted_snapshot_brings_its_deployment_back(orphaned: World) -> None:
    adopted = await orphaned.controller.snapshots.adopt("old")
    assert (adopted.deployment, adopted.orphan) == ("qa", False)
    info, _ = await orphaned.ask("qa")
    assert (info.tier, orphaned.nodes.named("restore")) == (Tier.LOCAL, [("restore", "n1", "old")])
    # And it is as if it had been made when it was adopted, however old it is.
    await orphaned.advance(3600)
    assert "old" in orphaned.nodes.world["n1"].snapshots
    await orphaned.advance(200_000)
    assert orphaned.nodes.world["n1"].snapshots == {}


async def test_an_adopted_snapshot_stays_adopted(orphaned: World) -> None:
    await orphaned.controller.snapshots.adopt("old", "other")
    await orphaned.crash()
    await orphaned.boot()
    await orphaned.until(lambda: "old" in orphaned.inventory.snapshots)
    assert orphaned.inventory.snapshot("old").deployment == "other"
    with pytest.raises(FailedPrecondition) as refusal:
        await orphaned.controller.snapshots.adopt("old")
    assert refusal.value.reason == "SNAPSHOT_NOT_ORPHAN"


async def test_a_snapshot_of_another_model_is_not_adopted(orphaned: World) -> None:
    orphaned.nodes.world["n1"].snapshots["other"] = Snapshot("other", "qa", "n1", 1.0, model="org/other")
    await orphaned.deploy()
    await orphaned.controller.core.fleet.refresh_snapshots("n1")
    with pytest.raises(FailedPrecondition) as refusal:
        await orphaned.controller.snapshots.adopt("other")
    assert (refusal.value.reason, refusal.value.field) == ("MODEL_DIFFERS", "deployment")


async def test_a_damaged_snapshot_is_not_adopted(orphaned: World) -> None:
    held = orphaned.nodes.world["n1"].snapshots
    held["old"] = replace(held["old"], quarantined=True, quarantine_reason="DIGEST_MISMATCH: a file")
    await orphaned.controller.core.fleet.refresh_snapshots("n1")
    with pytest.raises(FailedPrecondition, match="DIGEST_MISMATCH"):
        await orphaned.controller.snapshots.adopt("old")


async def test_an_orphan_is_deleted_by_an_explicit_word_alone(orphaned: World) -> None:
    await orphaned.advance(1e6)
    assert "old" in orphaned.nodes.world["n1"].snapshots
    await orphaned.controller.snapshots.delete("old")
    assert orphaned.nodes.world["n1"].snapshots == {}


async def test_what_is_deleted_while_its_node_is_away_is_not_used_when_that_is_back(world: World) -> None:
    for name in ("n1", "n2"):
        await world.node(name)
    await world.deploy()
    info, _ = await world.ask()
    (snapshot,) = world.inventory.snapshots
    # Given a second copy, on a node that does not answer
    other = "n2" if info.node == "n1" else "n1"
    held = world.nodes.world[info.node].snapshots[snapshot]
    world.nodes.world[other].snapshots[snapshot] = replace(held, node=other)
    await world.controller.core.fleet.refresh_snapshots(other)
    world.nodes.cut(other)
    await world.controller.core.fleet.give_up(other)
    # When the snapshot is deleted, and the node comes back
    await world.controller.snapshots.delete(snapshot)
    world.nodes.restore_contact(other)
    await world.advance(30)
    # Then it is gone there as well
    assert world.nodes.world[other].snapshots == {}
    assert (await world.registry.load()).captured == ()


async def test_a_deleted_snapshot_comes_back_as_an_orphan_and_can_be_adopted(world: World) -> None:
    await world.node("n1", object_store="s3://bucket")
    await world.deploy(checkpoint_storage=Storage.S3)
    await world.ask()
    await world.until(lambda: bool(world.nodes.bucket))
    (snapshot,) = world.nodes.bucket
    with pytest.raises(AlreadyExists):
        await world.controller.snapshots.undelete(snapshot)
    await world.controller.snapshots.delete(snapshot)
    found = await world.controller.snapshots.undelete(snapshot)
    assert (found.orphan, found.published) == (True, True)
    await world.advance(1e6)
    assert snapshot in world.nodes.bucket
    assert not (await world.controller.snapshots.adopt(snapshot)).orphan


async def test_a_snapshot_that_never_was_cannot_be_brought_back(world: World) -> None:
    await world.node("n1", object_store="s3://bucket")
    with pytest.raises(NotFound) as refusal:
        await world.controller.snapshots.undelete("never")
    assert refusal.value.reason == "SNAPSHOT_NOT_DELETED"

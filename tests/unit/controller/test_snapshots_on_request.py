"""``CreateSnapshot``: only ever from an instance that no prompt has entered."""

from __future__ import annotations

import asyncio

import pytest

from controller.deployments import Draft
from controller.model import InstanceState, Snapshot, StartMode, Tier, Weights
from dumont.errors import FailedPrecondition, Internal
from tests.unit.controller.controller_world import World


async def snapshot(world: World, identifier: str) -> tuple[Snapshot, list[str]]:
    told: list[str] = []
    made = await world.controller.starts.capture("qa", identifier, lambda _, stage: told.append(stage))
    return made, told


async def test_a_served_instance_is_left_alone_and_a_new_one_captured(world: World) -> None:
    await world.node()
    await world.deploy()
    first, _ = await world.ask()

    made, told = await snapshot(world, "mine")

    assert made.id == "mine"
    assert told == ["starting", "capturing"]
    assert world.nodes.named("capture")[-1][2] != first.instance
    # and what was started for it alone has ended
    assert list(world.inventory.instances) == [first.instance]


async def test_an_instance_that_was_started_for_a_capture_that_failed_ends_too(world: World) -> None:
    await world.node()
    await world.deploy()
    world.nodes.fail("capture", Internal("DUMP_FAILED", "no"))
    with pytest.raises(Internal):
        await snapshot(world, "mine")
    assert not world.inventory.instances


async def test_a_request_that_came_meanwhile_keeps_the_instance(world: World) -> None:
    # given a capture under way, and a request that waits for it
    await world.node()
    await world.deploy()
    held = world.nodes.hold("capture")
    capture = asyncio.ensure_future(snapshot(world, "mine"))
    await world.until(lambda: bool(world.nodes.named("capture")))
    asking = asyncio.ensure_future(world.ask())
    await world.until(lambda: world.controller.starts.waiting("qa") > 0)

    # when it has been made
    held.set()
    await capture

    # then the request is answered by what was started
    info, _ = await asking
    assert info.instance in world.inventory.instances
    assert len(world.nodes.named("start")) == 1


async def test_what_a_snapshot_replaces_is_told(world: World) -> None:
    await world.node()
    await world.deploy()
    await snapshot(world, "older")
    world.clock.advance(1)
    held = world.nodes.hold("delete_snapshot")
    made, _ = await snapshot(world, "newer")
    assert world.controller.snapshots.replaced_by(made) == ["older"]
    held.set()


async def test_a_clean_instance_is_used(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.controller.starts.start("qa")
    made, told = await snapshot(world, "mine")
    assert told == ["capturing"]
    assert len(world.nodes.named("start")) == 1
    await world.until(
        lambda: list(world.inventory.snapshots) == ["mine"] or len(world.inventory.snapshots) == 1
    )
    assert made.id == "mine"


async def test_a_clean_instance_with_its_weights_elsewhere_is_left_alone(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.controller.starts.start("qa")
    draft = Draft("org/model", "", StartMode.CHECKPOINT, checkpoint_weights=Weights.INCLUDED)
    await world.controller.core.deployments.update("qa", draft, frozenset({"checkpoint.weights"}), "")
    made, told = await snapshot(world, "mine")
    assert told == ["starting", "capturing"]
    assert made.weights is Weights.INCLUDED


async def test_the_older_snapshot_goes_once_the_new_one_is_committed(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()
    world.clock.advance(1)
    await snapshot(world, "newer")
    await world.until(lambda: list(world.inventory.snapshots) == ["newer"])
    order = [call[0] for call in world.nodes.calls if call[0] in ("capture", "delete_snapshot")]
    assert order == ["capture", "capture", "delete_snapshot"]


async def test_a_disabled_deployment_is_refused(world: World) -> None:
    await world.node()
    await world.deploy(StartMode.COLD)
    with pytest.raises(FailedPrecondition) as failure:
        await snapshot(world, "mine")
    assert failure.value.reason == "CHECKPOINT_DISABLED"
    assert world.nodes.named("start") == []


async def test_a_failure_is_told_and_hurts_no_request(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("capture")
    capturing = asyncio.create_task(snapshot(world, "mine"))
    await world.until(lambda: world.states() == [InstanceState.CAPTURING])
    asking = asyncio.create_task(world.ask())
    await world.settle()
    world.nodes.fail("capture", Internal("DUMP_FAILED", "no"))
    held.set()
    with pytest.raises(Internal, match="no"):
        await capturing
    info, frames = await asking
    assert frames == world.nodes.frames
    assert info.tier is Tier.RESIDENT
    assert world.controller.starts.condition(world.controller.core.deployments.get("qa"))[0].name == "ACTIVE"

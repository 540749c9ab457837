"""A node is drained: nothing more starts there, everything goes elsewhere, and a restart changes neither."""

from __future__ import annotations

import asyncio

import pytest

from controller.model import InstanceState, Report, StartMode, Tier
from dumont.errors import NotFound, ResourceExhausted, Unavailable
from tests.unit.controller.controller_world import World

SERVING, PARKED = InstanceState.SERVING, InstanceState.PARKED
BUCKET = "file:///bucket"


async def busy_node(world: World, deployments: int = 3, store: str = BUCKET) -> None:
    """Instances of several deployments on the first of two nodes."""
    await world.node("n1", object_store=store)
    for number in range(deployments):
        await world.deploy(identifier=f"d{number}")
        await world.ask(f"d{number}")
    await world.node("n2", object_store=store, memory=1)


def on(world: World, node: str) -> list[InstanceState]:
    return [report.state for report in world.nodes.world[node].instances.values()]


async def drained(world: World, timeout: float | None = None) -> list[tuple[str, str]]:
    """Drain the first node; what is left and why."""
    draining = asyncio.create_task(world.controller.migrations.drain("n1", timeout))
    for _ in range(20):
        await world.advance(1)
        if draining.done():
            break
    return [(one.instance, one.reason) for one in await draining]


async def test_everything_leaves_and_answers_go_on(world: World) -> None:
    await busy_node(world, deployments=7)
    assert on(world, "n1") == [SERVING] * 7

    assert await drained(world) == []

    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING] * 7)
    for number in range(7):
        info, _ = await world.ask(f"d{number}")
        assert (info.tier, info.node) == (Tier.RESIDENT, "n2")
    # All of them from snapshots.
    assert {node for _, node, _ in world.nodes.named("start")} == {"n1"}


async def test_nothing_starts_there_until_it_is_undrained(world: World) -> None:
    await busy_node(world, deployments=1)
    await drained(world)
    await world.deploy(StartMode.COLD, "other")
    await world.deploy(StartMode.COLD, "third")
    assert (await world.ask("other"))[0].node == "n2"

    await world.controller.core.fleet.set_draining("n2", True)
    with pytest.raises(Unavailable, match="undrain one") as refusal:
        await world.ask("third")
    assert refusal.value.reason == "NO_NODE"

    await world.controller.core.fleet.set_draining("n1", False)
    assert (await world.ask("third"))[0].node == "n1"


async def test_a_parked_instance_ends_and_its_snapshot_is_published(world: World) -> None:
    await busy_node(world, deployments=1)
    await world.advance(301)
    assert on(world, "n1") == [PARKED]

    assert await drained(world) == []

    assert (on(world, "n1"), on(world, "n2")) == ([], [])
    info, _ = await world.ask("d0")
    assert (info.tier, info.node) == (Tier.REMOTE, "n2")


async def test_without_a_store_models_are_loaded_again(world: World) -> None:
    await busy_node(world, deployments=2, store="")
    assert await drained(world) == []
    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING] * 2)
    assert [node for _, node, _ in world.nodes.named("start")] == ["n1", "n1", "n2", "n2"]


async def test_what_cannot_leave_is_told_and_leaves_when_it_can(world: World) -> None:
    await busy_node(world, deployments=2, store="")
    world.nodes.fail("start", ResourceExhausted("GPU_MEMORY", "no room"))

    left = await drained(world)

    assert [reason for _, reason in left] == ["GPU_MEMORY"]
    assert len(on(world, "n1")) == 1
    await world.advance(5)
    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING] * 2)


async def test_an_orphan_is_left_alone_and_told(world: World) -> None:
    await world.node("n1")
    world.nodes.tell("n1", Report("foreign", "nobody", SERVING))
    await world.settle()
    assert await drained(world) == [("foreign", "ORPHAN")]
    assert on(world, "n1") == [SERVING]


async def test_long_answers_are_waited_for_until_the_deadline(world: World) -> None:
    await busy_node(world, deployments=1)
    held = world.nodes.hold("frame 0")
    asking = asyncio.create_task(world.ask("d0"))
    await world.nodes.called("generate", 2)

    ((busy, reason),) = await drained(world, timeout=10.0)

    assert (busy, reason) == (world.inventory.instances_on("n1")[0].id, "INSTANCE_BUSY")
    held.set()
    info, frames = await asking
    assert (info.instance, frames) == (busy, world.nodes.frames)
    await world.advance(1)
    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING])


async def test_a_new_controller_and_a_node_that_registers_again_go_on_draining(world: World) -> None:
    await busy_node(world, deployments=3)
    world.nodes.hold("restore")
    draining = asyncio.create_task(world.controller.migrations.drain("n1", None))
    await world.nodes.called("restore")

    await world.crash()
    draining.cancel()
    await world.boot()
    world.nodes.finish_starts("n2")
    await world.advance(2)
    await world.node("n1", object_store=BUCKET)
    for _ in range(10):
        await world.advance(1)

    assert world.inventory.node("n1").draining
    assert on(world, "n1") == []
    assert SERVING in on(world, "n2")


async def test_undraining_ends_the_wait_and_keeps_what_is_there(world: World) -> None:
    await busy_node(world, deployments=1)
    world.nodes.hold("restore")
    draining = asyncio.create_task(world.controller.migrations.drain("n1", None))
    await world.nodes.called("restore")
    await world.controller.core.fleet.set_draining("n1", False)
    assert [one.reason for one in await draining] == ["UNDER_WAY"]


async def test_only_a_known_node_is_drained(world: World) -> None:
    with pytest.raises(NotFound):
        await world.controller.migrations.drain("n9", None)

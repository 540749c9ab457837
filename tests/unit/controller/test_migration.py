"""An instance is brought elsewhere: one serves all the time, and a failed step leaves the source serving."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from controller.migration import Destination
from controller.model import InstanceState, StartMode, Storage, Tier
from dumont.errors import (
    Aborted,
    DataLoss,
    DumontError,
    FailedPrecondition,
    Internal,
    NotFound,
    Unavailable,
)
from tests.unit.controller.controller_world import World

SERVING, PARKED = InstanceState.SERVING, InstanceState.PARKED
BUCKET = "file:///bucket"
TO_N2 = Destination("n2")


async def two_nodes(world: World, store: str = BUCKET, mode: StartMode = StartMode.CHECKPOINT) -> str:
    """Two nodes, and the id of an instance on the first that has answered."""
    await world.node("n1", object_store=store)
    await world.node("n2", object_store=store, memory=1)
    await world.deploy(mode, checkpoint_storage=Storage.LOCAL)
    info, _ = await world.ask()
    assert info.node == "n1"
    return info.instance


def on(world: World, node: str) -> list[InstanceState]:
    return [report.state for report in world.nodes.world[node].instances.values()]


async def stages(world: World, instance: str, to: Destination) -> list[str]:
    seen: list[str] = []
    await world.controller.migrations.migrate(instance, to, seen.append)
    return seen


async def test_it_is_restored_on_the_other_node_and_the_source_ends(world: World) -> None:
    source = await two_nodes(world)

    assert await stages(world, source, TO_N2) == ["waiting", "publishing", "restoring", "draining"]

    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING])
    info, _ = await world.ask()
    assert (info.tier, info.node) == (Tier.RESIDENT, "n2")
    assert world.nodes.spoiled == []


async def test_a_published_snapshot_is_not_published_again(world: World) -> None:
    source = await two_nodes(world)
    await world.controller.snapshots.publish(next(iter(world.inventory.snapshots)))
    assert await stages(world, source, TO_N2) == ["waiting", "restoring", "draining"]


async def test_an_unused_instance_without_a_snapshot_is_captured_for_it(world: World) -> None:
    await world.node("n1", object_store=BUCKET)
    await world.node("n2", object_store=BUCKET, memory=1)
    await world.deploy(StartMode.WARM, checkpoint_enabled=True)
    await world.until(lambda: world.states() == [SERVING])
    (source,) = world.inventory.instances

    seen = await stages(world, source, TO_N2)

    assert seen == ["waiting", "capturing", "publishing", "restoring", "draining"]
    await world.settle()
    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING])


async def test_answers_in_flight_end_at_the_source_and_new_requests_go_to_the_target(world: World) -> None:
    source = await two_nodes(world)
    held = world.nodes.hold("frame 0")
    asking = [asyncio.create_task(world.ask()) for _ in range(3)]
    await world.nodes.called("generate", 4)
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.until(lambda: world.inventory.instance(source).draining)

    late = asyncio.create_task(world.ask())
    await world.nodes.called("generate", 5)
    await world.advance(10_000)
    assert on(world, "n1") == [SERVING]
    held.set()

    early = await asyncio.gather(*asking)
    assert {info.instance for info, _ in early} == {source}
    assert all(frames == world.nodes.frames for _, frames in early)
    assert (await late)[0].node == "n2"
    await moving
    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING])


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("publish", Internal("STORE_FAILED", "the bucket is full")),
        ("restore", DataLoss("CANARY_MISMATCH", "other tokens")),
        ("restore", Unavailable("NODE_UNAVAILABLE", "no answer")),
    ],
)
async def test_a_step_that_fails_leaves_the_source_serving(
    world: World, method: str, error: DumontError
) -> None:
    source = await two_nodes(world)
    world.nodes.fail(method, error)

    with pytest.raises(type(error)) as failure:
        await world.controller.migrations.migrate(source, TO_N2)

    assert failure.value.reason == error.reason
    await world.advance(1)
    assert not world.inventory.instance(source).draining
    info, _ = await world.ask()
    assert info.instance == source


async def test_the_target_is_lost_while_the_source_drains(world: World) -> None:
    source = await two_nodes(world)
    held = world.nodes.hold("frame 0")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("generate", 2)
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.until(lambda: world.inventory.instance(source).draining)

    world.nodes.lose("n2", next(iter(world.nodes.world["n2"].instances)))

    with pytest.raises(Aborted, match="the source serves as before") as failure:
        await moving
    assert failure.value.reason == "TARGET_LOST"
    held.set()
    await asking
    await world.settle()
    assert (await world.ask())[0].instance == source


async def test_the_source_is_lost_while_the_target_is_made(world: World) -> None:
    source = await two_nodes(world)
    held = world.nodes.hold("restore")
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.nodes.called("restore")
    world.nodes.lose("n1", source)
    asking = asyncio.create_task(world.ask())
    await world.settle()
    held.set()

    info, _ = await asking
    assert info.node == "n2"
    assert (await moving).id == info.instance
    assert on(world, "n2") == [SERVING]


async def test_the_source_fails_while_the_target_is_made(world: World) -> None:
    source = await two_nodes(world)
    held = world.nodes.hold("restore")
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.nodes.called("restore")
    report = world.nodes.world["n1"].instances[source]
    world.nodes.tell("n1", replace(report, state=InstanceState.FAILED))
    await world.settle()
    held.set()
    await world.settle()
    assert moving.done()
    assert (await moving).node == "n2"


async def test_the_source_node_is_lost_while_it_drains(world: World) -> None:
    source = await two_nodes(world)
    held = world.nodes.hold("frame 0")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("generate", 2)
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.until(lambda: world.inventory.instance(source).draining)
    world.nodes.cut("n1")
    await world.advance(60)

    assert (await moving).node == "n2"
    held.set()
    await asking


async def test_a_migration_that_is_cancelled_while_the_source_drains_is_undone(world: World) -> None:
    source = await two_nodes(world)
    held = world.nodes.hold("frame 0")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("generate", 2)
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.until(lambda: world.inventory.instance(source).draining)

    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving
    held.set()
    await asking
    await world.settle()

    assert (on(world, "n1"), on(world, "n2")) == ([SERVING], [])


async def test_a_migration_that_is_cancelled_while_the_target_is_made_is_undone(world: World) -> None:
    source = await two_nodes(world)
    world.nodes.hold("restore")
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.nodes.called("restore")
    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving
    world.nodes.release_all()
    await world.settle()
    assert (on(world, "n1"), on(world, "n2")) == ([SERVING], [])
    assert (await world.ask())[0].instance == source


async def test_a_warm_deployment_keeps_the_target_and_not_the_older_source(world: World) -> None:
    await world.node("n1", object_store=BUCKET)
    await world.node("n2", object_store=BUCKET, memory=1)
    await world.deploy(StartMode.WARM)
    info, _ = await world.ask()
    held = world.nodes.hold("frame 0")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("generate", 2)
    moving = asyncio.create_task(
        world.controller.migrations.migrate(info.instance, Destination("n2", cold=True))
    )
    await world.until(lambda: world.inventory.instance(info.instance).draining)
    await world.advance(100)
    assert (on(world, "n1"), on(world, "n2")) == ([SERVING], [SERVING])
    held.set()
    await asking
    await moving
    await world.advance(100)
    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING])


async def test_without_a_store_it_is_refused_before_anything_happens_or_loaded_again(world: World) -> None:
    source = await two_nodes(world, store="")
    calls = len(world.nodes.calls)
    with pytest.raises(FailedPrecondition, match="--store-url") as refusal:
        await world.controller.migrations.migrate(source, TO_N2)
    assert refusal.value.reason == "NO_SHARED_STORE"
    assert len(world.nodes.calls) == calls
    # So that the snapshots differ in age.
    await world.advance(1)

    seen = await stages(world, source, Destination("n2", cold=True))

    assert seen == ["waiting", "starting", "draining"]
    assert (on(world, "n1"), on(world, "n2")) == ([], [SERVING])
    # Captured before any prompt, as in any first start.
    assert len(world.nodes.world["n2"].snapshots) == 1
    assert world.nodes.spoiled == []


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        (Destination("n1"), "SAME_NODE"),
        (Destination("n9"), "NODE_NOT_FOUND"),
        (Destination("n2", gpu="1"), "GPU_OF_ANOTHER_NODE"),
    ],
)
async def test_a_destination_that_makes_no_sense_is_refused(
    world: World, to: Destination, reason: str
) -> None:
    source = await two_nodes(world)
    with pytest.raises((FailedPrecondition, NotFound)) as refusal:
        await world.controller.migrations.migrate(source, to)
    assert refusal.value.reason == reason


async def test_what_is_being_migrated_is_not_migrated_twice(world: World) -> None:
    source = await two_nodes(world)
    held = world.nodes.hold("restore")
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.nodes.called("restore")
    with pytest.raises(Aborted) as refusal:
        await world.controller.migrations.migrate(source, TO_N2)
    assert refusal.value.reason == "MIGRATION_UNDER_WAY"
    held.set()
    await moving


async def on_a_gpu(world: World) -> str:
    source = await two_nodes(world)
    known = world.nodes.world["n1"].instances[source]
    world.nodes.tell("n1", replace(known, device="cuda:0", gpu="GPU-a"))
    await world.settle()
    return source


async def test_on_another_gpu_the_same_instance_goes_on_with_its_answers(world: World) -> None:
    source = await on_a_gpu(world)
    held = world.nodes.hold("frame 0")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("generate", 2)
    moved = world.nodes.hold("move")
    moving = asyncio.create_task(world.controller.migrations.migrate(source, Destination(gpu="GPU-b")))
    await world.nodes.called("move")
    assert world.states() == [InstanceState.MOVING]

    # A request that comes meanwhile waits for its arrival and begins no other start.
    late = asyncio.create_task(world.ask())
    await world.advance(400)
    assert len(world.nodes.named("generate")) == 2
    moved.set()

    assert (await moving).report.gpu == "GPU-b"
    held.set()
    answers = await asyncio.gather(asking, late)
    assert {info.instance for info, _ in answers} == {source}
    assert len(world.nodes.named("start")) == 1


async def test_a_move_that_the_node_refuses_leaves_it_serving(world: World) -> None:
    source = await on_a_gpu(world)
    world.nodes.fail("move", FailedPrecondition("GPU_MODEL", "another model"))
    with pytest.raises(FailedPrecondition) as refusal:
        await world.controller.migrations.migrate(source, Destination(gpu="1"))
    assert refusal.value.reason == "GPU_MODEL"
    assert (await world.ask())[0].instance == source


async def test_a_controller_that_dies_during_a_migration_leaves_nothing_behind(world: World) -> None:
    source = await two_nodes(world)
    world.nodes.hold("restore")
    moving = asyncio.create_task(world.controller.migrations.migrate(source, TO_N2))
    await world.nodes.called("restore")

    await world.crash()
    await asyncio.wait([moving])
    await world.boot()
    world.nodes.finish_starts("n2")
    await world.advance(5)

    info, _ = await world.ask()
    assert info.tier is Tier.RESIDENT
    await world.advance(1000)
    assert (on(world, "n1"), on(world, "n2")) == ([], [])
    assert (await world.registry.load()).intents == ()

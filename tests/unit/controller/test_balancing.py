"""Idle instances leave crowded GPUs by themselves, and stay where they are in use."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from controller.model import InstanceState
from dumont.errors import ResourceExhausted
from tests.unit.controller.controller_world import World

GPUS = {"GPU-a": 100, "GPU-b": 100}


async def crowded(world: World, gpu_bytes: int = 40) -> list[str]:
    """Two instances on the first of two GPUs."""
    await world.node(gpus=GPUS)
    found = []
    for name in ("a", "b"):
        world.nodes.sizes[name] = (gpu_bytes, 1)
        await world.deploy(identifier=name)
        info, _ = await world.ask(name)
        report = world.nodes.world["n1"].instances[info.instance]
        world.nodes.tell("n1", replace(report, gpu="GPU-a"))
        found.append(info.instance)
    await world.settle()
    return found


def places(world: World) -> list[str]:
    return sorted(report.gpu for report in world.nodes.world["n1"].instances.values())


async def test_two_idle_instances_on_one_of_two_gpus_end_apart_and_stay(world: World) -> None:
    await crowded(world)
    assert places(world) == ["GPU-a", "GPU-a"]

    await world.advance(30)
    assert places(world) == ["GPU-a", "GPU-b"]

    await world.advance(200)
    assert places(world) == ["GPU-a", "GPU-b"]
    assert len(world.nodes.named("move")) == 1


async def test_instances_that_answer_are_left_where_they_are(world: World) -> None:
    await crowded(world)
    held = world.nodes.hold("frame 0")
    asking = [asyncio.create_task(world.ask(name)) for name in ("a", "b")]
    await world.nodes.called("generate", 4)
    await world.advance(60)
    assert world.nodes.named("move") == []
    held.set()
    await asyncio.gather(*asking)


async def test_a_move_that_fails_is_tried_again_after_a_rest_and_breaks_nothing(world: World) -> None:
    first, second = await crowded(world)
    world.nodes.fail("move", ResourceExhausted("GPU_MEMORY", "no room"))
    await world.advance(25)
    assert len(world.nodes.named("move")) == 1
    assert {i.state for i in world.inventory.instances.values()} == {InstanceState.SERVING}
    await world.advance(40)
    assert places(world) == ["GPU-a", "GPU-b"]
    assert {first, second} == set(world.inventory.instances)


@pytest.mark.parametrize("rebalance", [True, False])
async def test_it_can_be_turned_off(rebalance: bool) -> None:
    world = World()
    await world.boot(rebalance=rebalance)
    await crowded(world)
    await world.advance(120)
    assert len(world.nodes.named("move")) == int(rebalance)
    await world.controller.close()

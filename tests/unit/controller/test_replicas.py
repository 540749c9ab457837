"""Several instances of a deployment: when another one starts, who answers, and when one goes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controller.model import Capacity, InstanceState, StartMode
from controller.policy import QUEUE_SECONDS
from dumont.errors import ResourceExhausted
from tests.unit.controller.controller_world import World

SERVING, PARKED = InstanceState.SERVING, InstanceState.PARKED


async def busy(world: World, most: int, **settings: Any) -> tuple[asyncio.Task[Any], asyncio.Event]:
    """A deployment whose only instance computes one answer at a time, and has one that does not end."""
    await world.node()
    world.nodes.capacity = Capacity(1)
    await world.deploy(max_instances=most, **settings)
    await world.ask()
    held = world.nodes.hold("generate")
    slow = asyncio.create_task(world.ask())
    await world.nodes.called("generate", 2)
    world.nodes.hold_no_more("generate")
    return slow, held


async def waits(world: World) -> asyncio.Task[Any]:
    """A request that has entered the queue."""
    waiting = asyncio.create_task(world.ask())
    await world.settle()
    return waiting


async def test_when_requests_wait_another_instance_starts_from_the_snapshot_at_hand(world: World) -> None:
    slow, held = await busy(world, most=2)
    waiting = await waits(world)
    assert world.states() == [SERVING]

    await world.advance(QUEUE_SECONDS)
    info, _ = await waiting

    assert world.states() == [SERVING, SERVING]
    assert len(world.nodes.named("restore")) == 1
    assert info.instance == world.inventory.instances_of("qa")[1].id
    held.set()
    await slow


async def test_there_are_never_more_than_the_most(world: World) -> None:
    slow, held = await busy(world, most=2)
    more = [asyncio.create_task(world.ask()) for _ in range(20)]
    await world.settle()
    await world.advance(10 * QUEUE_SECONDS)
    assert len(world.states()) == 2
    held.set()
    await asyncio.gather(slow, *more)
    assert len(world.states()) == 2


async def test_the_first_one_answers_while_another_starts_and_if_that_fails(world: World) -> None:
    slow, held = await busy(world, most=2)
    world.nodes.fail("restore", *[ResourceExhausted("CACHE_FULL", "no room")] * 5)
    world.nodes.fail("start", *[ResourceExhausted("OUT_OF_MEMORY", "no memory left")] * 5)
    waiting = await waits(world)
    await world.advance(QUEUE_SECONDS)
    assert not waiting.done()
    held.set()
    await asyncio.gather(slow, waiting)
    tries = len(world.nodes.named("start"))
    await world.ask()
    # A failure is not repeated at once, and is none of the deployment that serves.
    assert len(world.nodes.named("start")) == tries
    deployment = world.controller.core.deployments.get("qa")
    assert world.controller.starts.condition(deployment)[0].name == "ACTIVE"


async def test_when_the_load_falls_the_younger_one_parks_and_ends(world: World) -> None:
    slow, held = await busy(world, most=2, idle_timeout=60.0, park_timeout=60.0)
    waiting = await waits(world)
    await world.advance(QUEUE_SECONDS)
    await waiting
    held.set()
    await slow
    oldest = world.inventory.instances_of("qa")[0].id
    for _ in range(5):
        assert (await world.ask())[0].instance == oldest
        await world.advance(30.0)
    assert [(i.id == oldest, i.state) for i in world.inventory.instances_of("qa")] in (
        [(True, SERVING), (False, PARKED)],
        [(True, SERVING)],
    )
    await world.ask()
    await world.advance(59.0)
    assert world.states() == [SERVING]


async def test_the_least_number_is_kept_without_requests_and_made_again(world: World) -> None:
    await world.node()
    await world.deploy(min_instances=2, max_instances=3, idle_timeout=30.0)
    await world.advance(20.0)
    assert world.states() == [SERVING, SERVING]
    await world.advance(3600.0)
    assert world.states() == [SERVING, SERVING]

    world.nodes.lose("n1", world.inventory.instances_of("qa")[0].id)
    await world.advance(20.0)
    assert world.states() == [SERVING, SERVING]


async def test_a_warm_deployment_keeps_one_and_lets_the_others_idle(world: World) -> None:
    slow, held = await busy(world, most=2, mode=StartMode.WARM, idle_timeout=60.0)
    waiting = await waits(world)
    await world.advance(QUEUE_SECONDS)
    await waiting
    held.set()
    await slow
    assert world.states() == [SERVING, SERVING]
    await world.advance(61.0)
    assert world.states() == [SERVING]


async def test_parked_memory_beyond_the_budget_is_taken_back(world: World) -> None:
    await world.node(parked_memory_limit_bytes=6 << 30, memory_total_bytes=100 << 30, memory=50 << 30)
    for model in ("a", "b"):
        world.nodes.sizes[model] = (0, 4 << 30)
        await world.deploy(identifier=model, idle_timeout=10.0, park_timeout=3600.0)
        await world.ask(model)
        await world.advance(5.0)
    await world.advance(20.0)
    assert world.states("a") + world.states("b") == [PARKED]
    assert (await world.ask("a"))[0].tier.value == "local"


@pytest.mark.parametrize("most", [1, 3])
async def test_a_thousand_first_requests_to_a_sleeping_deployment_are_one_restore(
    world: World, most: int
) -> None:
    await world.node()
    await world.deploy(max_instances=most)
    await world.ask()
    (known,) = world.inventory.instances_of("qa")
    await world.controller.instances.stop(known.id)

    answers = await asyncio.gather(*(world.ask() for _ in range(1000)))

    assert len(answers) == 1000
    assert len(world.nodes.named("restore")) == 1
    assert len({info.instance for info, _ in answers}) == 1

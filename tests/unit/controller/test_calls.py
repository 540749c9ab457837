"""What becomes of a call whose instance, node or caller goes away."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from controller.model import InstanceState, Tier
from controller.serving import Request
from dumont.engines import EMBEDS
from dumont.errors import DumontError, FailedPrecondition, NotFound, Unavailable
from tests.unit.controller.controller_world import Answered, World


def silent() -> Unavailable:
    return Unavailable("NODE_UNAVAILABLE", "no answer")


async def test_an_instance_found_dead_is_replaced_once_and_told(world: World) -> None:
    await world.node()
    await world.deploy()
    first, _ = await world.ask()
    world.nodes.fail("generate", Unavailable("HOST_DEAD", "its socket is gone"))

    info, frames = await world.ask()

    assert frames == world.nodes.frames
    assert info.instance != first.instance
    assert info.tier is Tier.LOCAL
    assert info.reasons[0] == (f"instances/{first.instance} did not answer: HOST_DEAD: its socket is gone")
    await world.settle()
    assert list(world.nodes.world["n1"].instances) == [info.instance]


async def test_a_second_death_goes_to_the_caller(world: World) -> None:
    await world.node()
    await world.deploy()
    dead = NotFound("INSTANCE_NOT_FOUND", "gone")
    world.nodes.fail("generate", dead, dead)
    with pytest.raises(NotFound, match="gone"):
        await world.ask()
    assert len(world.nodes.named("generate")) == 2


async def test_after_the_first_token_the_error_goes_to_the_caller(world: World) -> None:
    await world.node()
    await world.deploy()
    world.nodes.fail("frame 0", Unavailable("HOST_DEAD", "its socket is gone"))
    with pytest.raises(Unavailable, match="its socket is gone"):
        await world.ask()
    assert len(world.nodes.named("generate")) == 1
    assert [i.in_flight for i in world.inventory.instances.values()] == [0]


async def test_a_node_that_did_not_answer_is_asked_and_its_living_instance_used(world: World) -> None:
    await world.node()
    await world.deploy()
    first, _ = await world.ask()
    world.nodes.fail("generate", silent())

    asking = asyncio.create_task(world.ask())
    info, _ = await asking

    assert info.instance == first.instance
    assert "NODE_UNAVAILABLE" in info.reasons[0]
    assert world.nodes.named("stop") == []


async def test_a_start_whose_answer_was_lost_is_joined_not_repeated(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("start")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("start")
    report = next(iter(world.nodes.world["n1"].instances.values()))
    world.nodes.fail("start", silent())
    held.set()
    await world.settle()
    world.nodes.tell("n1", replace(report, state=InstanceState.SERVING))

    info, _ = await asking

    assert info.instance == report.id
    assert info.tier is Tier.COLD
    assert len(world.nodes.named("start")) == 1


async def test_a_cold_start_is_not_tried_for_ever_on_a_node_that_stays_silent(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("start")
    world.nodes.fail("start", silent(), silent())
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("start")
    world.nodes.world["n1"].instances.clear()
    held.set()
    with pytest.raises(Unavailable) as failure:
        await asking
    assert failure.value.reason == "NODE_UNAVAILABLE"
    assert len(world.nodes.named("start")) == 2


async def test_without_a_node_the_request_fails_at_once(world: World) -> None:
    await world.node()
    await world.deploy()
    world.nodes.cut("n1")
    await world.settle()
    asking = asyncio.create_task(world.ask())
    await world.advance(20)
    with pytest.raises(Unavailable) as failure:
        await asking
    assert failure.value.reason == "NO_NODE"
    assert failure.value.retry_after == 1.0


async def test_requests_wait_for_a_node_that_restarts(world: World) -> None:
    await world.node()
    await world.deploy()
    first, _ = await world.ask()
    world.nodes.cut("n1")
    await world.settle()
    asking = asyncio.create_task(world.ask())
    await world.settle()
    assert not asking.done()
    world.nodes.restore_contact("n1")
    await world.advance(1)

    info, _ = await asking

    assert info.instance == first.instance
    assert len(world.nodes.named("start")) == 1


async def test_a_request_on_the_wrong_engine_starts_nothing(world: World) -> None:
    await world.node()
    world.nodes.models["org/model"] = "embedding"
    await world.deploy()
    with pytest.raises(FailedPrecondition) as failure:
        await world.ask()
    assert failure.value.reason == "WRONG_ENGINE"
    assert world.nodes.named("start") == []
    info, answer = await world.controller.serving.embed(Request("qa", EMBEDS, str.encode))
    assert info.tier is Tier.COLD
    assert answer == b"".join(world.nodes.frames)


async def test_a_dead_instance_is_replaced_once_for_embeddings_too(world: World) -> None:
    await world.node()
    world.nodes.models["org/model"] = "embedding"
    await world.deploy()
    dead = Unavailable("HOST_DEAD", "gone")
    world.nodes.fail("embed", dead)
    info, _ = await world.controller.serving.embed(Request("qa", EMBEDS, str.encode))
    assert "HOST_DEAD" in info.reasons[0]
    world.nodes.fail("embed", dead, dead)
    with pytest.raises(Unavailable, match="gone"):
        await world.controller.serving.embed(Request("qa", EMBEDS, str.encode))


async def test_a_caller_who_leaves_in_the_stream_ends_the_call_on_the_node(world: World) -> None:
    await world.node()
    await world.deploy()
    world.nodes.hold("frame 0")
    answer = Answered()
    asking = asyncio.create_task(world.ask(timeout=9.0, answer=answer))
    await world.settle()
    assert answer.frames == world.nodes.frames[:1]
    (info,) = answer.starts
    assert world.inventory.instances[info.instance].in_flight == 1
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert [call[0] for call in world.nodes.cancelled] == ["generate"]
    assert world.inventory.instances[info.instance].in_flight == 0
    assert world.nodes.timeouts == [pytest.approx(8.95)]


async def test_a_caller_whose_time_was_up_during_the_start_costs_the_node_nothing(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("start")

    asking = asyncio.create_task(world.ask(timeout=2.0))
    await world.nodes.called("start")
    world.clock.advance(3)
    held.set()
    with pytest.raises(DumontError) as failure:
        await asking
    assert failure.value.reason == "DEADLINE_EXCEEDED"
    assert world.nodes.named("generate") == []

"""More models than fit into a GPU or into memory: who yields, who waits, and what callers are told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from controller import policy
from controller.estimates import ENGINE_BYTES, ENGINE_SHARE
from controller.instances import YIELD_SECONDS
from controller.inventory import WOKEN
from controller.model import InstanceState, StartMode, Tier
from controller.room import ACTIVE_SECONDS
from controller.serving import Request
from controller.starts.start import ROOM_SECONDS
from dumont.engines import EMBEDS
from dumont.errors import DumontError, FailedPrecondition, ResourceExhausted, Unavailable
from tests.unit.controller.controller_world import Answered, World

GIB = 1 << 30
GPU = "GPU-a"
SERVING, PARKED = InstanceState.SERVING, InstanceState.PARKED


async def deploy(world: World, *models: str, size: int = 6, **settings: Any) -> None:
    """A deployment of each model, whose instances take ``size`` GiB of a GPU and one of memory."""
    for model in models:
        world.nodes.sizes[model] = (size * GIB, GIB)
        # As much as the controller expects of an instance before it has seen one.
        world.nodes.weights_bytes[f"org/{model}"] = int((size - 10 * ENGINE_SHARE) * GIB) - ENGINE_BYTES
        await world.deploy(identifier=model, model=f"org/{model}", **settings)


async def one_gpu(world: World, *models: str, size: int = 6) -> None:
    """A node with one GPU of 10 GiB, and a deployment of each model."""
    await world.node("n1", gpus={GPU: 10 * GIB})
    await deploy(world, *models, size=size)


def asked(world: World, deployment: str, answer: Answered | None = None, **call: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(world.ask(deployment, answer=answer, **call))


async def test_an_idle_model_is_parked_for_another_one_and_comes_back_when_it_is_asked(world: World) -> None:
    await one_gpu(world, "a", "b")
    await world.ask("a")
    info, _ = await world.ask("b")

    assert (world.states("a"), world.states("b")) == ([PARKED], [SERVING])
    assert any("instances/a-" in reason and "parks: it was not used" in reason for reason in info.reasons)
    assert "make_room" in [phase.name for phase in info.phases]

    back, _ = await world.ask("a")
    assert back.tier is Tier.PARKED
    assert "make_room" in [phase.name for phase in back.phases]
    assert (world.states("a"), world.states("b")) == ([SERVING], [PARKED])
    assert world.nodes.world["n1"].most_taken[GPU] <= 10 * GIB


async def test_three_models_of_which_two_fit_are_all_answered_in_turn(world: World) -> None:
    await one_gpu(world, "a", "b", "c", size=5)
    for _ in range(3):
        for model in ("a", "b", "c"):
            await world.ask(model)
            await world.advance(1.0)
    assert world.nodes.world["n1"].most_taken[GPU] == 10 * GIB
    assert len(world.nodes.named("start")) == 3
    # Each wake parked one, the one that was not used for longest.
    assert len(world.nodes.named("resume")) == 6
    assert len(world.nodes.named("park")) == 7


async def test_a_model_that_answers_is_waited_for_by_an_equal_one(world: World) -> None:
    await one_gpu(world, "a", "b")
    await world.ask("a")
    held = world.nodes.hold("generate")
    first = asked(world, "a")
    await world.nodes.called("generate", 2)
    second = asked(world, "b")
    await world.advance(2 * ACTIVE_SECONDS)
    assert not second.done()
    assert world.states("a") == [SERVING]

    held.set()
    await first
    info, _ = await second

    assert world.states("a") == [PARKED]
    assert any("is in use and has priority 0" in reason for reason in info.reasons)


async def test_a_higher_priority_waits_out_the_active_time_and_then_lets_answers_end(world: World) -> None:
    await one_gpu(world, "a")
    await deploy(world, "b", priority=5)
    await world.ask("a")
    held = world.nodes.hold("generate")
    first = asked(world, "a")
    await world.nodes.called("generate", 2)
    second = asked(world, "b")
    await world.settle()
    assert world.states("a") == [SERVING]
    await world.advance(ACTIVE_SECONDS)
    # It answers what it has, and takes nothing new.
    assert world.states("a") == [InstanceState.PARKING]
    assert not world.nodes.named("park")

    held.set()
    await first
    info, _ = await second

    assert world.states("a") == [PARKED]
    assert any("its priority is 0, below 5" in reason for reason in info.reasons)


async def preempt(
    world: World, *, first_frame: bool
) -> tuple[asyncio.Task[Any], Answered, asyncio.Task[Any]]:
    """An answer of ``a`` that does not end in time, and a request for ``b``, whose priority is higher."""
    await one_gpu(world, "a")
    await deploy(world, "b", priority=5)
    await world.ask("a")
    await world.advance(ACTIVE_SECONDS)
    answer = Answered()
    world.nodes.hold("frame 0" if first_frame else "generate")
    slow = asked(world, "a", answer)
    await world.nodes.called("generate", 2)
    await world.settle()
    urgent = asked(world, "b")
    await world.settle()
    await world.advance(YIELD_SECONDS)
    return slow, answer, urgent


async def test_an_answer_that_has_begun_ends_with_a_status_that_can_be_retried(world: World) -> None:
    slow, answer, urgent = await preempt(world, first_frame=True)
    with pytest.raises(Unavailable) as ended:
        await slow
    assert ended.value.reason == "PREEMPTED"
    assert ended.value.retry_after
    assert "made room for a deployment of a higher priority; call again" in ended.value.message
    assert len(answer.frames) == 1
    world.nodes.release_all()
    await urgent
    assert (world.states("a"), world.states("b")) == ([PARKED], [SERVING])


async def test_a_request_of_which_no_token_was_sent_waits_and_is_answered_when_room_returns(
    world: World,
) -> None:
    slow, answer, urgent = await preempt(world, first_frame=False)
    await world.settle()
    assert not slow.done()
    world.nodes.release_all()
    await urgent
    info, frames = await slow
    assert frames == world.nodes.frames
    assert any("made room for a deployment of a higher priority" in reason for reason in info.reasons)
    assert (world.states("a"), world.states("b")) == ([SERVING], [PARKED])
    assert len(answer.starts) == 1


async def test_texts_that_are_not_embedded_yet_wait_until_room_returns(world: World) -> None:
    await world.node("n1", gpus={GPU: 10 * GIB})
    world.nodes.models["org/a"] = "embedding"
    await deploy(world, "a")
    await deploy(world, "b", priority=5)
    request = Request("a", EMBEDS, str.encode)
    await world.controller.serving.embed(request)
    await world.advance(ACTIVE_SECONDS)
    world.nodes.hold("embed")
    slow = asyncio.create_task(world.controller.serving.embed(request))
    await world.nodes.called("embed", 2)
    urgent = asked(world, "b")
    await world.settle()
    await world.advance(YIELD_SECONDS)
    await urgent
    world.nodes.release_all()
    info, answer = await slow
    assert answer
    assert any("made room for a deployment of a higher priority" in reason for reason in info.reasons)
    assert world.nodes.cancelled[-1][0] == "embed"


async def test_a_model_of_unknown_size_that_a_node_refuses_is_given_the_room_that_it_needs(
    world: World,
) -> None:
    await one_gpu(world, "a")
    await world.ask("a")
    world.nodes.sizes["b"] = (6 * GIB, GIB)
    await world.deploy(identifier="b")
    info, _ = await world.ask("b")
    assert any("GPU_MEMORY" in reason for reason in info.reasons)
    assert (world.states("a"), world.states("b")) == ([PARKED], [SERVING])


async def test_a_snapshot_on_request_makes_room_for_the_instance_that_it_is_taken_of(world: World) -> None:
    await one_gpu(world, "a", "b")
    await world.ask("b")
    await world.ask("a")
    await world.controller.starts.capture("b", "wanted", lambda instance, stage: None)
    assert world.states("a") == [PARKED]
    assert "wanted" in world.inventory.snapshots


async def test_of_two_that_want_one_victim_one_wins_and_the_other_waits(world: World) -> None:
    await one_gpu(world, "a", "b", "c")
    await world.ask("a")
    park = world.nodes.hold("park")
    both = [asked(world, "b"), asked(world, "c")]
    await world.nodes.called("park")
    await world.settle()
    assert len(world.nodes.named("park")) == 1
    assert len(world.nodes.named("start")) == 1
    park.set()
    await asyncio.gather(*both)
    assert world.nodes.world["n1"].most_taken[GPU] <= 10 * GIB
    assert sorted(world.states("b") + world.states("c"), key=lambda s: s.value) == [SERVING, PARKED]


async def test_room_goes_to_the_highest_priority_first_and_then_to_who_has_waited_longest(
    world: World,
) -> None:
    await world.node("n1", gpus={GPU: 10 * GIB})
    await deploy(world, "busy", priority=9)
    await deploy(world, "first", "second")
    await deploy(world, "urgent", priority=5)
    await world.ask("busy")
    held = world.nodes.hold("generate")
    slow = asked(world, "busy")
    await world.nodes.called("generate", 2)
    waiting = []
    for model in ("first", "second", "urgent"):
        waiting.append(asked(world, model))
        await world.settle()
        await world.advance(1.0)
    held.set()
    await asyncio.gather(slow, *waiting)
    started = [argument.partition("-")[0] for _, _, argument in world.nodes.named("start")]
    assert started == ["busy", "urgent", "first", "second"]


async def test_of_many_that_wait_only_the_first_decide_again_when_memory_becomes_free(world: World) -> None:
    models = [f"m{number:02}" for number in range(30)]
    await one_gpu(world, "busy", *models)
    await world.ask("busy")
    held = world.nodes.hold("generate")
    slow = asked(world, "busy")
    await world.nodes.called("generate", 2)
    waiting = [asked(world, model) for model in models]
    await world.settle()
    decided = []
    decide = policy.decide

    def counted(facts: policy.Facts, now: float) -> policy.Attempt | policy.Wait:
        decided.append(facts.deployment.id)
        return decide(facts, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "decide", counted)
        (instance,) = world.inventory.instances_of("busy")
        for memory in range(10):
            # What it reports of its load is no reason to look again.
            world.nodes.tell("n1", replace(instance.report, memory_bytes=memory))
        await world.settle()
        assert not decided
        world.nodes.hold("park")
        held.set()
        await slow
        await world.settle()
        assert len(decided) == WOKEN
    world.nodes.release_all()
    while not all(task.done() for task in waiting):
        await world.advance(1.0)
    await asyncio.gather(*waiting)


async def test_a_victim_that_cannot_be_parked_ends_and_its_snapshot_stays(world: World) -> None:
    await one_gpu(world, "a", "b")
    await world.ask("a")
    world.nodes.fail("park", FailedPrecondition("GPU_NOT_SUSPENDABLE", "no driver"))
    info, _ = await world.ask("b")
    assert (world.states("a"), world.states("b")) == ([], [SERVING])
    assert any("GPU_NOT_SUSPENDABLE" in reason for reason in info.reasons)
    back, _ = await world.ask("a")
    assert back.tier is Tier.LOCAL


async def test_where_memory_is_short_an_idle_model_ends_and_is_restored_when_it_is_asked(
    world: World,
) -> None:
    await world.node("n1", instance_memory_limit_bytes=10 * GIB)
    for model in ("a", "b", "c"):
        world.nodes.sizes[model] = (0, 4 * GIB)
        await world.deploy(identifier=model)
        # What it takes is known once it has run.
        await world.ask(model)
        await world.advance(1.0)
    assert (world.states("a"), world.states("b"), world.states("c")) == ([SERVING], [SERVING], [SERVING])

    for model in ("a", "b", "c") * 2:
        for instance in world.inventory.instances_of(model):
            await world.controller.instances.stop(instance.id)
        info, _ = await world.ask(model)
        assert info.tier is Tier.LOCAL
        taken = sum(report.ram_bytes for report in world.nodes.world["n1"].instances.values())
        assert taken <= 10 * GIB
        await world.advance(1.0)


async def test_what_waits_for_room_in_vain_is_told_when_to_call_again(world: World) -> None:
    await one_gpu(world, "a", "b")
    await world.ask("a")
    world.nodes.hold("generate")
    slow = asked(world, "a")
    await world.nodes.called("generate", 2)
    refused = asked(world, "b")
    await world.settle()
    await world.advance(ROOM_SECONDS + 5)
    with pytest.raises(ResourceExhausted) as refusal:
        await refused
    assert refusal.value.reason == "NO_ROOM"
    assert refusal.value.retry_after
    assert "is in use and has priority 0" in refusal.value.message
    world.nodes.release_all()
    await slow


async def test_nobody_makes_room_for_a_request_that_has_left(world: World) -> None:
    await one_gpu(world, "a", "b")
    await world.ask("a")
    held = world.nodes.hold("generate")
    slow = asked(world, "a")
    await world.nodes.called("generate", 2)
    gone = asked(world, "b", timeout=5.0)
    await world.settle()
    await world.advance(6.0)
    with pytest.raises(DumontError) as late:
        await gone
    assert late.value.reason == "DEADLINE_EXCEEDED"

    held.set()
    await slow
    await world.advance(5.0)
    assert world.states("a") == [SERVING]
    assert len(world.nodes.named("start")) == 1


async def test_a_warm_model_keeps_its_place_against_its_equals(world: World) -> None:
    await one_gpu(world, "b")
    await deploy(world, "w", mode=StartMode.WARM)
    await world.settle()
    assert world.states("w") == [SERVING]
    waiting = asked(world, "b", timeout=20.0)
    await world.settle()
    await world.advance(21.0)
    with pytest.raises(DumontError):
        await waiting
    assert world.states("w") == [SERVING]


# Which node


async def test_a_node_where_a_cold_start_failed_is_passed_over_for_a_while(world: World) -> None:
    await world.node("n1", memory=2 << 30)
    await world.node("n2", memory=1 << 30)
    await world.deploy()
    world.nodes.fail("start", ResourceExhausted("OUT_OF_MEMORY", "no memory left"))
    info, _ = await world.ask()
    assert info.node == "n2"
    assert [node for _, node, _ in world.nodes.named("start")] == ["n1", "n2"]

    await world.deploy(identifier="other")
    assert (await world.ask("other"))[0].node == "n1", "only this deployment is kept from it"
    (known,) = world.inventory.instances_of("qa")
    await world.controller.instances.stop(known.id)
    for snapshot in world.inventory.snapshots_of("qa"):
        await world.controller.snapshots.delete(snapshot.id)
    assert (await world.ask())[0].node == "n2"

    (known,) = world.inventory.instances_of("qa")
    await world.advance(20.0)
    await world.controller.instances.stop(known.id)
    for snapshot in world.inventory.snapshots_of("qa"):
        await world.controller.snapshots.delete(snapshot.id)
    assert (await world.ask())[0].node == "n1"


async def test_a_slow_node_makes_no_other_deployment_wait(world: World) -> None:
    await one_gpu(world, "a")
    await world.ask("a")
    await world.node("n2", gpus={"GPU-b": 10 * GIB})
    await deploy(world, "b", "c")
    # The start on one node hangs.
    start = world.nodes.hold("start")
    hanging = asked(world, "b")
    await world.nodes.called("start", 2)
    world.nodes.hold_no_more("start")
    info, _ = await world.ask("c")
    assert info.node != world.nodes.named("start")[1][1]
    start.set()
    await hanging

"""From a request to an instance: tiers in order, one start at a time, captures before prompts."""

from __future__ import annotations

import asyncio

import pytest

from controller.deployments import Draft
from controller.model import InstanceState, Report, Snapshot, StartMode, Tier, Weights
from dumont.errors import DataLoss, Internal, InvalidArgument, ResourceExhausted
from tests.unit.controller.controller_world import World

MISMATCH = DataLoss("CANARY_MISMATCH", "other tokens than at capture")


@pytest.mark.parametrize("weights", Weights)
async def test_a_start_has_its_weights_where_the_deployment_wants_them(
    world: World, weights: Weights
) -> None:
    await world.node()
    await world.deploy(checkpoint_weights=weights)

    await world.ask()

    assert list(world.nodes.weights.values()) == [weights]


async def test_after_a_change_of_where_weights_go_the_next_cold_start_is_captured_anew(world: World) -> None:
    # given: a snapshot without the weights, and no instance
    await world.node()
    await world.deploy()
    await world.ask()
    (old,) = world.inventory.snapshots_of("qa")
    await world.controller.instances.stop(world.inventory.instances_of("qa")[0].id)

    # when
    draft = Draft("org/model", "", StartMode.CHECKPOINT, checkpoint_weights=Weights.INCLUDED)
    await world.controller.core.deployments.update("qa", draft, frozenset({"checkpoint.weights"}), "")
    await world.advance(1)
    info, _ = await world.ask()

    # then
    assert info.tier is Tier.COLD
    assert any(f"snapshots/{old.id} has its weights detached, not included" in one for one in info.reasons)
    await world.advance(5)
    (new,) = world.inventory.snapshots_of("qa")
    assert (new.id != old.id, new.weights) == (True, Weights.INCLUDED)

    # and from then on that one is restored
    await world.controller.instances.stop(world.inventory.instances_of("qa")[0].id)
    info, _ = await world.ask()
    assert info.tier is Tier.LOCAL


async def test_a_first_start_is_cold_and_captured_before_the_prompt_enters(world: World) -> None:
    await world.node()
    await world.deploy()

    info, frames = await world.ask()

    assert info.tier is Tier.COLD
    assert frames == world.nodes.frames
    order = [call[0] for call in world.nodes.calls if call[0] in ("start", "capture", "generate")]
    assert order == ["start", "capture", "generate"]
    assert len(world.inventory.snapshots_of("qa")) == 1
    assert info.reasons[0] == "no instance and no usable snapshot"
    assert info.reasons[1].startswith("captured snapshots/qa-")
    assert [phase.name for phase in info.phases] == ["decide", "record", "dispatch", "load", "capture"]


async def test_the_next_request_finds_it_resident(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()
    info, _ = await world.ask()
    assert info.tier is Tier.RESIDENT
    assert [phase.name for phase in info.phases] == ["decide"]
    assert len(world.nodes.named("start")) == 1


@pytest.mark.parametrize("mode", [StartMode.COLD, StartMode.WARM])
async def test_other_start_modes_capture_nothing(world: World, mode: StartMode) -> None:
    await world.node()
    await world.deploy(mode, idle_timeout=60.0)
    info, _ = await world.ask()
    assert info.tier in (Tier.COLD, Tier.RESIDENT)
    assert world.nodes.named("capture") == []


async def test_a_parked_instance_is_resumed(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()
    await world.advance(301)
    assert world.states() == [InstanceState.PARKED]

    info, _ = await world.ask()

    assert info.tier is Tier.PARKED
    assert world.states() == [InstanceState.SERVING]


async def test_a_stopped_deployment_is_restored(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()
    await world.advance(301)
    await world.advance(601)
    assert world.states() == []

    info, _ = await world.ask()

    assert info.tier is Tier.LOCAL
    assert len(world.nodes.named("start")) == 1
    assert len(world.nodes.named("capture")) == 1


async def asleep(world: World) -> None:
    """A deployment with one parked instance and one snapshot."""
    await world.node()
    await world.deploy()
    await world.ask()
    await world.advance(301)
    world.nodes.calls.clear()


async def test_every_tier_that_fails_falls_to_the_next_and_is_told(world: World) -> None:
    await asleep(world)
    world.nodes.fail("resume", Internal("RESUME_FAILED", "stuck"))
    world.nodes.fail("restore", MISMATCH)

    info, frames = await world.ask()

    assert info.tier is Tier.COLD
    assert frames == world.nodes.frames
    order = [c[0] for c in world.nodes.calls if c[0] in ("resume", "restore", "start", "generate")]
    assert order == ["resume", "restore", "start", "generate"]
    told = "\n".join(info.reasons)
    assert "failed: RESUME_FAILED: stuck" in told
    assert "failed: CANARY_MISMATCH: other tokens than at capture" in told
    assert {"failed_parked", "failed_local"} <= {phase.name for phase in info.phases}
    counted = world.controller.core.metrics.registry.get_sample_value(
        "dumont_controller_fallbacks_total", {"tier": "local", "reason": "CANARY_MISMATCH"}
    )
    assert counted == 1


async def test_a_failed_restore_leaves_no_instance_behind(world: World) -> None:
    await asleep(world)
    world.nodes.lose("n1", world.inventory.instances_of("qa")[0].id)
    await world.settle()
    world.nodes.fail("restore", MISMATCH)
    await world.ask()
    await world.settle()
    (left,) = world.nodes.world["n1"].instances
    assert [intent.instance for intent in (await world.registry.load()).intents] == [left]


async def test_a_quarantined_snapshot_is_not_tried_again(world: World) -> None:
    await world.node()
    await world.deploy()
    bad = Snapshot("bad", "qa", "n1", world.clock.moment().wall, quarantined=True)
    world.nodes.world["n1"].snapshots["bad"] = bad
    await world.controller.core.fleet.refresh_snapshots("n1")
    info, _ = await world.ask()
    assert info.tier is Tier.COLD
    assert world.nodes.named("restore") == []


async def test_when_every_tier_fails_the_caller_learns_all_of_it(world: World) -> None:
    await asleep(world)
    world.nodes.fail("resume", Internal("RESUME_FAILED", "stuck"))
    world.nodes.fail("restore", MISMATCH)
    world.nodes.fail("start", ResourceExhausted("OUT_OF_MEMORY", "no memory left"))

    with pytest.raises(ResourceExhausted) as failure:
        await world.ask()

    assert failure.value.reason == "OUT_OF_MEMORY"
    assert "RESUME_FAILED" in failure.value.message
    assert "CANARY_MISMATCH" in failure.value.message
    state, message = world.controller.starts.condition(world.controller.core.deployments.get("qa"))
    assert state.name == "DEGRADED"
    assert "OUT_OF_MEMORY" in message
    info, _ = await world.ask()
    assert info.tier in (Tier.PARKED, Tier.LOCAL, Tier.COLD)
    assert world.controller.starts.condition(world.controller.core.deployments.get("qa"))[0].name == "ACTIVE"


async def test_a_failed_capture_does_not_fail_the_request_and_is_backed_off_from(world: World) -> None:
    await world.node()
    await world.deploy()
    world.nodes.fail("capture", Internal("DUMP_FAILED", "criu said no"))

    info, frames = await world.ask()

    assert info.tier is Tier.COLD
    assert frames == world.nodes.frames
    assert any("DUMP_FAILED: criu said no" in reason for reason in info.reasons)
    assert world.inventory.snapshots == {}

    await world.controller.instances.stop(world.inventory.instances_of("qa")[0].id)
    await world.ask()
    assert len(world.nodes.named("capture")) == 1

    await world.controller.instances.stop(world.inventory.instances_of("qa")[0].id)
    world.clock.advance(31)
    world.controller.core.fleet.heartbeat("n1", 0)
    await world.ask()
    assert len(world.nodes.named("capture")) == 2


async def test_an_instance_that_dies_in_its_capture_is_replaced(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("capture")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("capture")
    victim = world.inventory.instances_of("qa")[0].id
    world.nodes.lose("n1", victim)
    world.nodes.fail("capture", Internal("DUMP_FAILED", "it died"))
    held.set()

    info, _ = await asking

    assert info.instance != victim
    assert len(world.nodes.named("start")) == 2
    assert len(world.nodes.named("capture")) == 1


async def test_requests_share_one_start(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("start")
    asking = [asyncio.create_task(world.ask()) for _ in range(5)]
    await world.nodes.called("start")
    await world.settle()
    held.set()

    answers = await asyncio.gather(*asking)

    assert len(world.nodes.named("start")) == 1
    assert [info.tier for info, _ in answers] == [Tier.COLD] * 5
    joined = [info for info, _ in answers if info.reasons[0] == "joined a start under way"]
    assert len(joined) == 4
    assert all([phase.name for phase in info.phases] == ["queue"] for info in joined)


async def test_one_who_leaves_does_not_take_the_start_away(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("start")
    first, second = (asyncio.create_task(world.ask()) for _ in range(2))
    await world.nodes.called("start")
    first.cancel()
    await world.settle()
    held.set()

    info, _ = await second

    assert first.cancelled()
    assert info.tier is Tier.COLD
    assert world.nodes.cancelled == []


async def test_a_start_nobody_waits_for_completes_and_idles_out(world: World) -> None:
    await world.node()
    await world.deploy(StartMode.COLD)
    held = world.nodes.hold("start")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("start")
    asking.cancel()
    await world.settle()
    assert world.states() == [InstanceState.STARTING]
    held.set()
    await world.until(lambda: world.states() == [])
    assert len(world.nodes.named("stop")) == 1
    assert world.nodes.cancelled == []


async def test_prewarm_brings_it_up_without_a_request(world: World) -> None:
    await world.node()
    await world.deploy()
    world.controller.starts.begin("qa")
    assert (
        world.controller.starts.condition(world.controller.core.deployments.get("qa"))[0].name == "CREATING"
    )
    await world.until(lambda: world.states() == [InstanceState.SERVING])
    await world.until(lambda: not world.controller.starts.starting("qa"))
    info, _ = await world.ask()
    assert info.tier is Tier.RESIDENT
    assert len(world.nodes.named("capture")) == 1


async def test_an_instance_found_serving_is_never_captured(world: World) -> None:
    """Given a stranger on a node, a prompt may be inside; only our own starts are surely clean."""
    await world.node()
    await world.deploy()
    world.nodes.tell("n1", Report("qa-old", "qa", InstanceState.SERVING))
    await world.until(lambda: world.states() == [InstanceState.SERVING])
    info, _ = await world.ask()
    assert info.instance == "qa-old"
    assert world.nodes.named("capture") == []


async def test_an_instance_a_prompt_has_entered_is_not_captured_later(world: World) -> None:
    await world.node()
    await world.deploy()
    world.nodes.fail("capture", Internal("DUMP_FAILED", "criu said no"))
    first, _ = await world.ask()
    await world.advance(40)

    info, _ = await world.ask()

    assert (info.tier, info.instance) == (Tier.RESIDENT, first.instance)
    assert len(world.nodes.named("capture")) == 1
    assert world.nodes.spoiled == []


async def test_a_cold_start_that_fails_on_one_node_is_tried_on_another(world: World) -> None:
    for name in ("n1", "n2"):
        await world.node(name)
    await world.deploy()
    world.nodes.fail("start", ResourceExhausted("GPU_MEMORY", "no room"))
    info, _ = await world.ask()
    tried = [node for _, node, _ in world.nodes.named("start")]
    assert sorted(tried) == ["n1", "n2"]
    assert info.node == tried[1]
    assert f"cold start on nodes/{tried[0]} failed: GPU_MEMORY: no room" in info.reasons


async def test_a_model_that_fails_everywhere_is_loaded_on_three_nodes_and_no_more(world: World) -> None:
    for name in ("n1", "n2", "n3", "n4", "n5"):
        await world.node(name)
    await world.deploy()
    world.nodes.fail("start", *[Internal("HOST_LOST", "killed")] * 5)
    with pytest.raises(Internal) as failure:
        await world.ask()
    assert failure.value.reason == "HOST_LOST"
    assert failure.value.message.count("cold start on nodes/") == 2
    assert len({node for _, node, _ in world.nodes.named("start")}) == 3


async def test_a_request_that_is_wrong_is_wrong_on_every_node(world: World) -> None:
    for name in ("n1", "n2"):
        await world.node(name)
    await world.deploy()
    world.nodes.fail("start", InvalidArgument("UNKNOWN_ENGINE", "there is no such engine"))
    with pytest.raises(InvalidArgument):
        await world.ask()
    assert len(world.nodes.named("start")) == 1


async def test_a_dead_node_stalls_only_what_it_may_hold(world: World) -> None:
    # Given a controller that starts beside a node that does not answer, and two deployments
    for name in ("n1", "n2"):
        await world.node(name)
    await world.deploy()
    info, _ = await world.ask()
    await world.deploy(identifier="other")
    world.nodes.cut(info.node)
    await world.crash()
    await world.boot()
    await world.until(lambda: [n.state.name for n in world.inventory.nodes.values()].count("READY") == 1)

    # Then the one with nothing there starts at once
    elsewhere, _ = await world.ask("other")
    assert elsewhere.node != info.node

    # And the one that was started there waits until the node is given up
    asking = asyncio.create_task(world.ask())
    await world.settle()
    assert not asking.done()
    await world.advance(16)
    again, _ = await asking
    assert again.node != info.node

"""What the controller does by itself: timers, restarts, deletions, nodes that come and go."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from controller import expiry
from controller.model import Captured, InstanceState, NodeState, StartMode, Tier
from dumont.errors import FailedPrecondition, Internal, NotFound, Unavailable
from tests.fakes.memory_registry import MemoryRegistry
from tests.unit.controller.controller_world import World

SERVING, PARKED = InstanceState.SERVING, InstanceState.PARKED


async def test_a_checkpoint_deployment_parks_stops_and_forgets_its_snapshot(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()

    await world.advance(299)
    assert world.states() == [SERVING]
    await world.advance(2)
    assert world.states() == [PARKED]
    await world.advance(599)
    assert world.states() == [PARKED]
    await world.advance(2)
    assert world.states() == []
    assert len(world.inventory.snapshots) == 1
    await world.advance(86400 - 900)
    assert world.inventory.snapshots == {}
    assert world.nodes.world["n1"].snapshots == {}


async def test_a_cold_deployment_stops_after_its_last_request(world: World) -> None:
    await world.node()
    await world.deploy(StartMode.COLD)
    held = world.nodes.hold("frame 0")
    asking = [asyncio.create_task(world.ask()) for _ in range(2)]
    await world.nodes.called("generate", 2)
    await world.advance(1000)
    assert world.states() == [SERVING]
    held.set()
    answers = await asyncio.gather(*asking)
    assert len(answers) == 2
    await world.until(lambda: world.states() == [])


async def test_nothing_is_parked_while_a_request_runs(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("frame 0")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("generate")
    await world.advance(10_000)
    assert world.states() == [SERVING]
    assert len(world.inventory.snapshots) == 1
    held.set()
    await asking
    await world.advance(301)
    assert world.states() == [PARKED]


async def test_nothing_is_stopped_while_a_capture_runs(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("capture")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("capture")
    await world.advance(10_000)
    assert world.states() == [InstanceState.CAPTURING]
    held.set()
    info, _ = await asking
    assert info.tier is Tier.COLD


async def test_an_instance_that_cannot_park_is_stopped_instead(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()
    world.nodes.fail("park", FailedPrecondition("CANNOT_FREEZE", "no cgroup"))
    await world.advance(301)
    await world.advance(10)
    assert world.states() == []
    assert len(world.inventory.snapshots) == 1


async def test_a_person_may_not_park_under_a_request_nor_resume_what_serves(world: World) -> None:
    await world.node()
    await world.deploy()
    with await world.controller.starts.acquire("qa") as lease:
        with pytest.raises(FailedPrecondition) as busy:
            await world.controller.instances.park(lease.info.instance)
        with pytest.raises(FailedPrecondition) as illegal:
            await world.controller.instances.resume(lease.info.instance)
    assert busy.value.reason == "INSTANCE_BUSY"
    assert illegal.value.reason == "ILLEGAL_TRANSITION"
    assert world.nodes.named("park") == []
    assert (await world.controller.instances.park(lease.info.instance)).state is PARKED
    assert (await world.controller.instances.resume(lease.info.instance)).state is SERVING


async def test_a_command_runs_on_when_its_caller_leaves(world: World) -> None:
    await world.node()
    await world.deploy()
    info, _ = await world.ask()
    held = world.nodes.hold("park")
    parking = asyncio.create_task(world.controller.instances.park(info.instance))
    await world.nodes.called("park")
    parking.cancel()
    held.set()
    await world.until(lambda: world.states() == [PARKED])
    assert parking.cancelled()


async def test_after_a_refused_command_the_node_says_what_is_true(world: World) -> None:
    await world.node()
    await world.deploy()
    info, _ = await world.ask()
    world.nodes.world["n1"].instances.pop(info.instance)
    world.nodes.fail("park", Internal("BROKEN", "?"))
    with pytest.raises(Internal):
        await world.controller.instances.park(info.instance)
    assert world.states() == []


async def test_a_warm_deployment_starts_when_created_and_stays(world: World) -> None:
    await world.node()
    await world.deploy(StartMode.WARM)
    await world.until(lambda: world.states() == [SERVING])
    await world.advance(10_000)
    assert world.states() == [SERVING]
    assert world.nodes.named("capture") == []
    assert world.nodes.named("park") == []


async def test_a_lost_warm_instance_comes_back_with_growing_waits(world: World) -> None:
    await world.node()
    await world.deploy(StartMode.WARM)
    gaps = []
    for _ in range(4):
        await world.until(lambda: world.states() == [SERVING])
        await world.until(lambda: not world.controller.starts.starting("qa"))
        world.nodes.lose("n1", world.inventory.instances_of("qa")[0].id)
        await world.settle()
        lost = world.clock.moment().monotonic
        while not world.states():
            await world.advance(0.5)
        gaps.append(world.clock.moment().monotonic - lost)
    assert gaps == sorted(gaps)
    assert gaps[0] <= 1.0
    assert gaps[-1] >= 4.0
    await world.until(lambda: world.states() == [SERVING])
    await world.advance(100)
    world.nodes.lose("n1", world.inventory.instances_of("qa")[0].id)
    await world.until(lambda: world.states() == [SERVING])


async def test_a_warm_start_that_fails_is_tried_again(world: World) -> None:
    await world.node()
    world.nodes.fail("start", Internal("LOAD_FAILED", "no"))
    await world.deploy(StartMode.WARM)
    await world.until(lambda: "qa" in world.controller.starts.failures)
    await world.advance(2)
    await world.until(lambda: world.states() == [SERVING])
    assert world.controller.starts.failures == {}


async def test_deleting_ends_instances_and_snapshots_then_forgets(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()
    await world.controller.core.deployments.begin_delete("qa")
    await world.controller.starts.cancel("qa")
    with pytest.raises(FailedPrecondition, match="being deleted"):
        await world.ask()
    await world.until(lambda: "qa" not in world.controller.core.deployments.by_id)
    assert world.nodes.world["n1"].instances == {}
    assert world.nodes.world["n1"].snapshots == {}
    assert (await world.registry.load()).deployments == ()
    with pytest.raises(NotFound):
        await world.ask()


async def test_deleting_cancels_a_start_on_its_node(world: World) -> None:
    await world.node()
    await world.deploy()
    world.nodes.hold("start")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("start")
    await world.controller.core.deployments.begin_delete("qa")
    await world.controller.starts.cancel("qa")
    with pytest.raises(FailedPrecondition, match="being deleted"):
        await asking
    await world.until(lambda: "qa" not in world.controller.core.deployments.by_id)
    assert [call[0] for call in world.nodes.cancelled] == ["start"]
    assert world.nodes.world["n1"].instances == {}


async def test_a_deletion_is_finished_by_the_next_controller(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()
    world.nodes.fail("stop", *[Unavailable("BUSY", "later")] * 3)
    await world.controller.core.deployments.begin_delete("qa")
    await world.crash()
    await world.boot()
    await world.advance(60)
    await world.until(lambda: not world.controller.core.deployments.by_id)
    assert world.nodes.world["n1"].instances == {}


async def test_a_controller_that_lost_its_database_ends_and_deletes_nothing(world: World) -> None:
    # Given an instance and a snapshot, and a controller that knows of neither
    await world.node()
    await world.deploy()
    info, _ = await world.ask()
    await world.crash()
    world.registry = MemoryRegistry()
    await world.boot()

    # When the node registers, and however long it takes
    await world.node()
    await world.advance(200_000)

    # Then both are there, as orphans
    made = world.nodes.world["n1"]
    assert list(made.instances) == [info.instance]
    (snapshot,) = world.inventory.snapshots.values()
    assert snapshot.orphan
    assert list(made.snapshots) == [snapshot.id]

    # And a deployment of that name starts cold: what it would restore may be anybody's
    world.nodes.lose("n1", info.instance)
    await world.deploy()
    again, _ = await world.ask()
    assert again.tier is Tier.COLD
    assert snapshot.id in made.snapshots


async def test_a_database_of_last_week_makes_nothing_expire(world: World) -> None:
    # Given a snapshot in daily use, whose time to live is a day
    await world.node()
    await world.deploy()
    await world.ask()
    week_ago = await world.registry.load()
    for _ in range(7):
        await world.advance(80_000)
        await world.ask()
    # When the database of the first day is put in the place of the last
    await world.crash()
    world.registry = MemoryRegistry()
    for deployment in week_ago.deployments:
        await world.registry.create_deployment(deployment)
    for captured in week_ago.captured:
        await world.registry.save_captured(captured)
    await world.registry.save_last_use(dict(week_ago.last_use or {}))
    world.who = replace(world.who, outdated=True)
    await world.boot()
    await world.node()
    await world.advance(60)
    # Then the snapshot is there
    assert len(world.nodes.world["n1"].snapshots) == 1


async def test_a_silent_node_is_given_up_and_taken_back_with_what_it_holds(world: World) -> None:
    await world.node()
    await world.deploy()
    info, _ = await world.ask()
    world.nodes.cut("n1")
    await world.advance(16)
    assert world.inventory.nodes["n1"].state is NodeState.UNREACHABLE
    world.nodes.calls.clear()
    await world.advance(1000)
    assert world.nodes.calls == []

    world.nodes.restore_contact("n1")
    await world.advance(10)
    assert world.inventory.nodes["n1"].state is NodeState.READY  # type: ignore[comparison-overlap]
    assert [i.id for i in world.inventory.instances_of("qa")] == [info.instance]


async def test_an_unknown_node_is_told_to_register(world: World) -> None:
    with pytest.raises(NotFound) as failure:
        world.controller.core.fleet.heartbeat("n9", 0)
    assert failure.value.reason == "NODE_UNKNOWN"


async def test_a_controller_that_died_during_a_start_starts_nothing_twice(world: World) -> None:
    await world.node()
    await world.deploy()
    world.nodes.hold("start")
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("start")
    (intent,) = (await world.registry.load()).intents
    await world.crash()
    asking.cancel()

    await world.boot()
    again = asyncio.create_task(world.ask())
    await world.settle()
    assert [i.id for i in world.inventory.instances_of("qa")] == [intent.instance]
    report = world.nodes.world["n1"].instances[intent.instance]
    world.nodes.tell("n1", replace(report, state=SERVING))
    info, _ = await again

    assert info.instance == intent.instance
    assert info.tier is Tier.COLD
    assert len(world.nodes.named("start")) == 1
    # Nobody was served before: the capture still comes first.
    order = [call[0] for call in world.nodes.calls if call[0] in ("start", "capture", "generate")]
    assert order == ["start", "capture", "generate"]
    # It stays written down who started the instance, until that is gone.
    assert [i.instance for i in (await world.registry.load()).intents] == [info.instance]
    world.nodes.lose("n1", info.instance)
    await world.settle()
    assert (await world.registry.load()).intents == ()


async def test_an_intent_that_never_reached_its_node_is_dropped(world: World) -> None:
    await world.node()
    await world.deploy()
    held = world.nodes.hold("start")
    world.nodes.fail("start", Unavailable("NODE_UNAVAILABLE", "lost"))
    asking = asyncio.create_task(world.ask())
    await world.nodes.called("start")
    world.nodes.world["n1"].instances.clear()
    await world.crash()
    asking.cancel()
    assert held.is_set()
    await world.boot()
    await world.until(lambda: world.inventory.nodes["n1"].state is NodeState.READY)
    await world.settle()
    assert (await world.registry.load()).intents == ()
    assert world.states() == []


async def test_a_restarted_controller_knows_everything_again(world: World) -> None:
    await world.node()
    await world.deploy()
    first, _ = await world.ask()
    await world.advance(3)
    used = world.controller.core.deployments.last_use["qa"]
    await world.crash()
    await world.boot()
    assert world.controller.core.deployments.last_use == {"qa": used}
    info, _ = await world.ask()
    assert (info.tier, info.instance) == (Tier.RESIDENT, first.instance)
    assert len(world.nodes.named("start")) == 1


async def test_a_snapshot_is_known_whose_capture_ends_under_the_next_controller(world: World) -> None:
    # given: the next controller finds the instance while it is captured, and no snapshot yet
    await world.node()
    await world.deploy()
    await world.ask()
    (report,) = world.nodes.world["n1"].instances.values()
    (made,) = world.nodes.world["n1"].snapshots.values()
    world.nodes.world["n1"].snapshots.clear()
    await world.crash()
    world.nodes.world["n1"].instances[report.id] = replace(report, state=InstanceState.CAPTURING)
    await world.boot()
    inventory = world.controller.core.inventory
    await world.until(lambda: inventory.nodes["n1"].state is NodeState.READY)
    assert inventory.held_on("n1") == ()

    # when
    world.nodes.world["n1"].snapshots[made.id] = made
    world.nodes.tell("n1", replace(report, state=SERVING))

    # then
    await world.until(lambda: [snapshot.id for snapshot in inventory.held_on("n1")] == [made.id])


async def test_a_request_never_waits_for_the_database(world: World) -> None:
    await world.node()
    await world.deploy()
    await world.ask()

    async def forbidden(*_: object) -> None:
        raise Unavailable("DATABASE_UNAVAILABLE", "gone")

    world.registry.save_last_use = forbidden  # type: ignore[method-assign,assignment]
    world.registry.save_intent = forbidden  # type: ignore[method-assign,assignment]
    info, _ = await world.ask()
    assert info.tier is Tier.RESIDENT
    await world.advance(5)
    del world.registry.save_last_use
    await world.advance(5)
    assert (await world.registry.load()).last_use == world.controller.core.deployments.last_use


async def test_watchers_see_everything_then_each_change(world: World) -> None:
    await world.node()
    await world.deploy()
    info, _ = await world.ask()
    changes: Any = world.inventory.watch()
    assert (await anext(changes)).id == info.instance
    assert type(await anext(changes)).__name__ == "Synchronized"
    await world.controller.instances.park(info.instance)
    assert (await anext(changes)).state in (InstanceState.PARKING, PARKED)
    await world.controller.instances.stop(info.instance)
    while type(change := await anext(changes)).__name__ != "Removed":
        pass
    assert change.instance == info.instance
    await changes.aclose()


def counted(world: World, metric: str, **labels: str) -> float | None:
    return world.controller.core.metrics.registry.get_sample_value(
        f"dumont_controller_{metric}_total", labels
    )


async def test_a_defect_in_planning_ends_no_timer_for_good(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: an instance that will be idle, and a plan that raises three times
    await world.node()
    await world.deploy()
    await world.ask()
    calls: list[float] = []
    plan = expiry.plan

    def broken(*arguments: Any) -> expiry.Plan:
        calls.append(world.clock.moment().monotonic)
        if len(calls) <= 3:
            raise RuntimeError("a defect")
        return plan(*arguments)

    monkeypatch.setattr(expiry, "plan", broken)

    # when
    for _ in range(10):
        await world.advance(1)
    await world.advance(301)

    # then: it was planned again, later each time, and the instance was parked in the end
    await world.until(lambda: world.states() == [PARKED])
    assert calls[1] - calls[0] < calls[2] - calls[1] < calls[3] - calls[2]
    assert counted(world, "reconciler_errors") == 3


async def test_a_defect_outside_a_plan_does_not_end_the_loop_either(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.node()
    await world.deploy()
    await world.ask()
    inventory = world.controller.core.inventory
    failures = iter(range(3))
    take = inventory.take_departed

    def broken() -> list[str]:
        if next(failures, None) is not None:
            raise RuntimeError("a defect")
        return take()

    monkeypatch.setattr(inventory, "take_departed", broken)
    for _ in range(10):
        await world.advance(1)
    await world.advance(301)

    await world.until(lambda: world.states() == [PARKED])
    assert counted(world, "reconciler_errors") == 3


async def test_a_defect_in_an_action_is_counted_and_tried_again_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: parking raises what no node says
    await world.node()
    await world.deploy()
    await world.ask()
    tries: list[float] = []

    async def broken(instance: str) -> None:
        tries.append(world.clock.moment().monotonic)
        raise RuntimeError("a defect")

    monkeypatch.setattr(world.controller.instances, "park", broken)

    # when
    await world.advance(330)

    # then: it was tried again, but not in a tight loop
    assert 1 < len(tries) < 10
    assert counted(world, "actions", action="Park", outcome="crashed") == len(tries)


async def test_the_record_of_a_capture_that_was_never_made_goes(world: World) -> None:
    # given: a controller that dies between the record of a capture and the capture
    await world.node()
    await world.deploy()
    await world.ask()
    await world.registry.save_captured(Captured("never", "qa", "its uid", "", "n1"))
    # when
    await world.crash()
    await world.boot()
    await world.until(lambda: world.inventory.nodes["n1"].state is NodeState.READY)
    await world.settle()
    # then
    assert "never" not in world.inventory.captured
    assert "never" not in {captured.id for captured in (await world.registry.load()).captured}
    assert len(world.inventory.captured) == 1

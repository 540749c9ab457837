"""A source that has given up its GPU for a while: it gets it back, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from dumont.errors import Aborted
from snapshotd.model import State
from tests.unit.snapshotd.instances.gpu_world import FILES, GIB, A, GpuHost, ReadyLoader, World, a_world
from tests.unit.snapshotd.instances.instances_world import an_instance


@pytest.fixture
def world(tmp_path: Path) -> World:
    return a_world(tmp_path)


@pytest.mark.parametrize("job", ["capture", "park"])
async def test_while_a_source_is_off_its_gpu_its_room_is_promised_to_it(world: World, job: str) -> None:
    host = await world.serving()
    host.gates["trim"] = asyncio.Event()
    work = world.instances.capture("one", "first") if job == "capture" else world.instances.park("one")
    working = asyncio.create_task(work)
    await host.reached.wait()

    assert world.gpus.reservations.reserved(A.uuid) == 6 * GIB

    host.gates["trim"].set()
    await asyncio.wait([working])
    assert world.gpus.reservations.reserved(A.uuid) == 0


async def test_a_cancelled_capture_waits_for_the_trim_before_it_wakes_the_driver(world: World) -> None:
    # given a capture whose process is looking through memory that the driver made
    host = await world.serving()
    host.gates["trim"] = asyncio.Event()
    working = asyncio.create_task(world.instances.capture("one", "first"))
    await host.reached.wait()

    # when it is cancelled
    working.cancel()
    for _ in range(20):
        await asyncio.sleep(0)

    # then the driver is left alone until that has ended
    assert set(world.cuda.states.values()) == {"checkpointed"}
    host.gates["trim"].set()
    await asyncio.wait([working])
    assert world.runs()


async def test_an_order_of_weights_that_fails_costs_nothing_but_time(world: World) -> None:
    # given a node with a loader, and a model host that does not get through to it
    node = world.instances.node
    node = replace(node, gpus=replace(world.gpus, loader=ReadyLoader()))
    world.instances.node = node
    host = await world.serving()
    world.instances._record("one").instance = replace(world.instances.get("one"), weight_files=FILES)
    await world.instances.park("one")
    host.failing = {"order_weights"}

    # when it comes back
    resumed = await world.instances.resume("one")

    # then it serves, having tried
    assert resumed.state is State.SERVING
    assert "order_weights" in host.commands


async def test_a_capture_of_what_came_from_a_damaged_snapshot_is_refused(world: World) -> None:
    await world.serving()
    world.instances._record("one").instance = replace(world.instances.get("one"), snapshot="origin")
    world.store.quarantined["origin"] = "its canary was wrong"

    with pytest.raises(Exception, match="quarantined") as refusal:
        await world.instances.capture("one", "first")

    assert getattr(refusal.value, "reason", "") == "ORIGIN_QUARANTINED"
    assert world.runs()
    assert world.store.staged == set()


async def test_a_source_that_does_not_answer_after_its_checkpoint_is_ended(world: World) -> None:
    host = await world.serving()
    host.failing = {"trim", "status"}

    with pytest.raises(Aborted):
        await world.instances.park("one")

    assert host.released


async def test_a_new_daemon_waits_for_a_trim_of_the_earlier_one_before_it_wakes_the_driver(
    world: World,
) -> None:
    # given a process whose daemon died while it was looking through memory that the driver made
    host = GpuHost("one")
    host.state = "QUIESCED"
    host.gates["status"] = asyncio.Event()
    world.hosts.found, world.cuda.states = [host], {42: "checkpointed", 43: "checkpointed"}
    world.instances.journal.write(replace(an_instance(State.CAPTURING), device="cuda:0", gpu=A.uuid))

    # when the next one takes over
    taking = asyncio.create_task(world.instances.take_over())
    await host.reached.wait()

    # then the driver is left alone until the process answers
    assert set(world.cuda.states.values()) == {"checkpointed"}
    host.gates["status"].set()
    await taking
    assert set(world.cuda.states.values()) == {"running"}
    assert host.state == "SERVING"

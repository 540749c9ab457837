"""Instances on GPUs: placed where there is room, and moved."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from dumont.errors import (
    Aborted,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
)
from snapshotd.instances.move import move
from snapshotd.model import State
from tests.unit.snapshotd.instances.gpu_world import (
    GIB,
    MIG,
    MODEL,
    A,
    B,
    ReadyLoader,
    World,
    a_snapshot,
    a_world,
)
from tests.unit.snapshotd.instances.instances_world import an_instance


@pytest.fixture
def world(tmp_path: Path) -> World:
    return a_world(tmp_path)


# Places


async def test_a_cold_start_sees_the_gpu_with_the_most_room_and_no_other(world: World) -> None:
    world.status.free_bytes[A.uuid] = 10 * GIB
    host = await world.serving()
    assert host.environment["CUDA_VISIBLE_DEVICES"] == B.uuid
    assert world.instances.get("one").gpu == B.uuid


async def test_a_cold_start_goes_to_the_gpu_that_is_named(world: World) -> None:
    world.status.free_bytes[A.uuid] = 10 * GIB
    host = await world.serving(gpu="0")
    assert host.environment["CUDA_VISIBLE_DEVICES"] == A.uuid


async def test_on_a_divided_gpu_the_driver_chooses(world: World) -> None:
    world.status.shared = [MIG]
    host = await world.serving()
    assert "CUDA_VISIBLE_DEVICES" not in host.environment
    assert world.instances.get("one").gpu == ""


async def test_starts_at_once_go_to_different_gpus(world: World) -> None:
    for name in ("one", "two"):
        world.instances.admit(replace(an_instance(State.STARTING), id=name))
    await asyncio.gather(*(world.instances.start(name, MODEL) for name in ("one", "two")))
    assert {world.instances.get(name).gpu for name in ("one", "two")} == {A.uuid, B.uuid}


async def test_replicas_restored_at_once_spread_over_the_gpus(world: World) -> None:
    world.cuda.states = {42: "checkpointed", 43: "checkpointed", 52: "checkpointed"}
    one, two = await asyncio.gather(world.restored("one", a_snapshot()), world.restored("two", a_snapshot()))
    assert {one.gpu, two.gpu} == {A.uuid, B.uuid}
    # The one that stays needs no map; the other's lists both GPUs.
    swap = {A.uuid: B.uuid, B.uuid: A.uuid}
    assert [devices for devices in world.cuda.devices if devices] == [swap] * (2 if one.gpu == B.uuid else 1)
    assert world.gpus.reservations.reserved(A.uuid) == world.gpus.reservations.reserved(B.uuid) == 0


async def test_replicas_restored_at_once_are_not_promised_the_same_memory_twice(world: World) -> None:
    world.status.free_bytes = {A.uuid: 10 * GIB, B.uuid: 0}
    world.cuda.states = {42: "checkpointed", 43: "checkpointed", 52: "checkpointed"}
    outcomes = await asyncio.gather(
        world.restored("one", a_snapshot()),
        world.restored("two", a_snapshot()),
        return_exceptions=True,
    )
    (refusal,) = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert isinstance(refusal, ResourceExhausted)
    assert refusal.reason == "GPU_MEMORY"


async def test_a_full_gpu_is_refused_before_there_is_a_process(world: World) -> None:
    world.status.free_bytes = {A.uuid: 5 * GIB, B.uuid: 5 * GIB}
    with pytest.raises(ResourceExhausted) as refusal:
        await world.restored("one", a_snapshot())
    assert refusal.value.metadata["needed_bytes"] == str(6 * GIB)
    assert world.hosts.taken == []


async def test_a_snapshot_of_another_node_is_mapped_to_the_gpus_here(world: World) -> None:
    world.cuda.states = {42: "checkpointed", 43: "checkpointed"}
    elsewhere = a_snapshot(gpus=("GPU-x", "GPU-y"), gpu="GPU-y")
    instance = await world.restored("one", elsewhere, gpu="GPU-a")
    assert instance.gpu == A.uuid
    assert world.cuda.devices == [{"GPU-x": B.uuid, "GPU-y": A.uuid}] * 2


async def test_an_older_snapshot_that_names_no_gpu_was_on_the_first(world: World) -> None:
    world.cuda.states = {42: "checkpointed", 43: "checkpointed"}
    instance = await world.restored("one", a_snapshot(gpu=""), gpu="1")
    assert instance.gpu == B.uuid
    assert world.cuda.devices[0] == {A.uuid: B.uuid, B.uuid: A.uuid}


async def test_a_gpu_that_is_not_here_fails_the_restore_with_those_that_are(world: World) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        await world.restored("one", a_snapshot(), gpu="7")
    assert refusal.value.reason == "GPU_UNKNOWN"
    assert world.hosts.taken == []


# Moves


async def test_a_live_instance_moves_to_another_gpu_and_is_known_to_be_there(world: World) -> None:
    await world.serving()
    moved = await move(world.instances, "one", B.uuid)
    assert (moved.state, moved.gpu, moved.device) == (State.SERVING, B.uuid, "cuda:0")
    assert world.cuda.devices == [{A.uuid: B.uuid, B.uuid: A.uuid}] * 2
    assert world.runs()

    # And back: it is parked with what it holds there.
    world.status.holding[42] = (B.uuid, 7 * GIB)
    back = await move(world.instances, "one", "0")
    assert (back.gpu, back.gpu_bytes) == (A.uuid, 7 * GIB)
    assert world.cuda.devices[2:] == [{A.uuid: B.uuid, B.uuid: A.uuid}] * 2


async def test_a_move_carries_the_requests_along_instead_of_waiting_for_them(world: World) -> None:
    host = await world.serving()
    moved = await move(world.instances, "one", "1")
    assert host.commands == ["pause", "continue"]
    assert not moved.paused


@pytest.mark.parametrize("reason", ["NOT_PAUSABLE", "UNKNOWN_COMMAND"])
async def test_where_it_cannot_be_paused_its_requests_are_answered_first(world: World, reason: str) -> None:
    host = await world.serving()
    host.refusing["pause"] = FailedPrecondition(reason, "not this one")
    moved = await move(world.instances, "one", "1")
    assert (moved.state, moved.gpu) == (State.SERVING, B.uuid)
    assert [command for command in host.commands if command != "status"] == [
        "pause", "drain", "quiesce", "trim", "wake", "serve",
    ]  # fmt: skip


@pytest.mark.parametrize(("operation", "fault"), [("lock", "busy"), ("checkpoint", "refuse")])
async def test_a_move_that_cannot_suspend_goes_on_where_it_is(
    world: World, operation: str, fault: str
) -> None:
    host = await world.serving()
    world.cuda.faults[operation, 42] = fault
    with pytest.raises(DumontError):
        await move(world.instances, "one", "1")
    known = world.instances.get("one")
    assert (known.state, known.gpu, known.paused) == (State.SERVING, A.uuid, False)
    assert host.state == "SERVING"
    assert host.commands[-1] == "continue"
    assert world.runs()


async def test_weights_are_brought_to_the_gpu_that_the_process_comes_back_on(world: World) -> None:
    node = world.instances.node
    world.instances.node = replace(node, gpus=replace(world.gpus, loader=ReadyLoader()))
    host = await world.serving(gpu="0")
    await move(world.instances, "one", "1")
    # Loaded on the one, brought back on the other.
    assert host.ordered == [A.uuid, B.uuid]

    world.cuda.states[52] = "checkpointed"
    await world.restored("two", a_snapshot(), gpu="1")
    assert world.hosts.taken[1].ordered == [B.uuid]


async def test_a_parked_instance_resumes_on_another_gpu(world: World) -> None:
    await world.serving()
    await world.instances.park("one")
    resumed = await world.instances.resume("one", gpu="1")
    assert (resumed.state, resumed.gpu) == (State.SERVING, B.uuid)


async def test_a_parked_instance_whose_gpu_is_full_resumes_where_there_is_room(world: World) -> None:
    await world.serving()
    parked = await world.instances.park("one")
    assert parked.gpu == A.uuid
    world.status.free_bytes[A.uuid] = 0
    resumed = await world.instances.resume("one")
    assert (resumed.state, resumed.gpu) == (State.SERVING, B.uuid)


async def test_a_parked_instance_stays_where_it_was_while_there_is_room(world: World) -> None:
    await world.serving()
    await world.instances.park("one")
    world.status.free_bytes[B.uuid] = 2 * world.status.free_bytes[A.uuid]
    assert (await world.instances.resume("one")).gpu == A.uuid


async def test_where_it_is_already_it_stays_untouched(world: World) -> None:
    host = await world.serving()
    assert (await move(world.instances, "one", "0")).state is State.SERVING
    assert host.commands == []


@pytest.mark.parametrize(
    ("gpu", "free", "reason"),
    [("7", 80, "GPU_UNKNOWN"), ("", 80, "GPU_UNKNOWN"), ("1", 5, "GPU_MEMORY"), (B.uuid, 0, "GPU_MEMORY")],
)
async def test_a_move_that_cannot_be_leaves_the_instance_serving_untouched(
    world: World, gpu: str, free: int, reason: str
) -> None:
    host = await world.serving()
    world.status.free_bytes[B.uuid] = free * GIB
    with pytest.raises(DumontError) as refusal:
        await move(world.instances, "one", gpu)
    assert refusal.value.reason == reason
    assert host.commands == []
    assert world.cuda.calls == []
    assert world.instances.get("one").state is State.SERVING
    assert world.gpus.reservations.reserved(B.uuid) == 0


async def test_a_move_whose_room_is_taken_meanwhile_ends_where_it_began(world: World) -> None:
    host = await world.serving()
    host.gates["pause"] = gate = asyncio.Event()
    moving = asyncio.create_task(move(world.instances, "one", "1"))
    await host.reached.wait()
    world.status.free_bytes[B.uuid] = 0
    gate.set()
    with pytest.raises(ResourceExhausted):
        await moving
    known = world.instances.get("one")
    assert (known.state, known.gpu) == (State.SERVING, A.uuid)
    assert world.runs()


async def test_a_move_ends_as_begun_also_when_its_caller_leaves(world: World) -> None:
    host = await world.serving()
    host.gates["pause"] = gate = asyncio.Event()
    moving = asyncio.create_task(move(world.instances, "one", "1"))
    await host.reached.wait()
    moving.cancel()
    asyncio.get_running_loop().call_soon(gate.set)
    with pytest.raises(asyncio.CancelledError):
        await moving
    known = world.instances.get("one")
    assert (known.state, known.gpu) == (State.SERVING, B.uuid)


async def test_a_map_that_the_driver_refuses_ends_the_instance(world: World) -> None:
    host = await world.serving()
    world.cuda.faults["restore", 42] = "refuse"
    with pytest.raises(Aborted) as refusal:
        await move(world.instances, "one", "1")
    assert refusal.value.reason == "CUDA_FAILED"
    assert host.released
    assert world.instances.get("one").state is State.FAILED


async def test_what_runs_on_the_cpu_goes_to_no_gpu(world: World) -> None:
    world.instances.admit(an_instance(State.STARTING))
    await world.instances.start("one", MODEL)
    record = world.instances._record("one")
    record.instance = replace(record.instance, device="cpu", gpu="")
    with pytest.raises(FailedPrecondition) as refusal:
        await move(world.instances, "one", "1")
    assert refusal.value.reason == "NO_GPU"

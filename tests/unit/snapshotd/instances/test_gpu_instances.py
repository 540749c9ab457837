"""Instances on GPUs: whole trees suspended or none, and refused before anything is touched."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from dumont.errors import (
    Aborted,
    DataLoss,
    DumontError,
    FailedPrecondition,
    ResourceExhausted,
)
from snapshotd.main import unsuspendable
from snapshotd.model import Canary, Finding, Sharing, State, Weights
from snapshotd.system.disk import DiskReservations, FileSystem
from tests.unit.snapshotd.instances.gpu_world import (
    CUDA_FAULTS,
    FACTS,
    GIB,
    MIG,
    MPS,
    A,
    B,
    GpuHost,
    World,
    a_snapshot,
    a_world,
)
from tests.unit.snapshotd.instances.instances_world import an_instance


@pytest.fixture
def world(tmp_path: Path) -> World:
    return a_world(tmp_path)


# Trees


async def test_a_park_suspends_every_cuda_process_of_the_instance_and_a_resume_resumes_them(
    world: World,
) -> None:
    await world.serving()
    parked = await world.instances.park("one")
    assert world.cuda.states == {42: "checkpointed", 43: "checkpointed"}
    assert (parked.gpu, parked.gpu_bytes) == (A.uuid, 6 * GIB)

    await world.instances.resume("one")
    assert world.runs()
    assert world.cuda.devices == [{}, {}]


@pytest.mark.parametrize("pid", [42, 43])
@pytest.mark.parametrize(("operation", "kind"), CUDA_FAULTS)
@pytest.mark.parametrize("job", ["park", "capture"])
async def test_a_park_or_capture_that_the_driver_fails_leaves_the_instance_serving(
    world: World, job: str, operation: str, kind: str, pid: int
) -> None:
    await world.serving()
    world.cuda.faults[operation, pid] = kind
    with pytest.raises(Aborted) as refusal:
        await (world.instances.park("one") if job == "park" else world.instances.capture("one", "first"))
    assert refusal.value.metadata["step"] == f"{job}.cuda_checkpoint"
    assert world.runs()
    assert world.instances.get("one").state is State.SERVING
    assert world.store.staged == set()


@pytest.mark.parametrize(("job", "step"), [("park", "trim"), ("capture", "trim"), ("capture", "dump")])
async def test_what_fails_once_the_gpu_was_given_up_leaves_the_instance_serving(
    world: World, job: str, step: str
) -> None:
    host = await world.serving()
    host.failing = {step}
    with pytest.raises(Aborted, match=step):
        await (world.instances.park("one") if job == "park" else world.instances.capture("one", "first"))
    assert world.runs()
    assert world.instances.get("one").state is State.SERVING


@pytest.mark.parametrize("step", ["drain", "quiesce", "trim", "dump"])
async def test_what_was_prepared_for_a_dump_is_abandoned_when_the_capture_fails(
    world: World, step: str
) -> None:
    host = await world.serving()
    host.failing = {step}
    with pytest.raises(Aborted, match=step):
        await world.instances.capture("one", "first")
    assert not host.prepared
    assert world.store.staged == set()


async def test_a_capture_that_cannot_be_prepared_does_not_pause_its_source(world: World) -> None:
    host = await world.serving()
    host.failing = {"prepare"}
    with pytest.raises(Aborted, match="prepare"):
        await world.instances.capture("one", "first")
    assert not {"drain", "quiesce"} & set(host.commands)
    assert world.store.staged == set()


async def test_a_capture_that_finds_the_gpu_full_when_it_is_done_says_so_and_tries_again(
    world: World,
) -> None:
    await world.serving()
    world.cuda.faults["restore", 42] = "full"
    with pytest.raises(ResourceExhausted) as refusal:
        await world.instances.capture("one", "first")
    assert refusal.value.metadata["step"] == "capture.cuda_restore"
    assert world.runs()
    assert world.store.staged == set()


@pytest.mark.parametrize("job", ["park", "capture"])
async def test_what_no_driver_brings_back_is_ended_and_not_left_hanging(world: World, job: str) -> None:
    host = await world.serving()
    world.cuda.faults["checkpoint", 43] = "break"
    with pytest.raises(Aborted):
        await (world.instances.park("one") if job == "park" else world.instances.capture("one", "first"))
    assert host.released
    assert world.instances.get("one").state is State.FAILED


@pytest.mark.parametrize(
    ("kind", "reason"), [("refuse", "CUDA_FAILED"), ("full", "GPU_MEMORY"), ("die", "CUDA_AGENT_LOST")]
)
async def test_a_resume_that_the_driver_fails_ends_the_instance(world: World, kind: str, reason: str) -> None:
    host = await world.serving()
    await world.instances.park("one")
    world.cuda.faults["restore", 43] = kind
    with pytest.raises(DumontError) as refusal:
        await world.instances.resume("one")
    assert refusal.value.reason == reason
    assert host.released
    assert world.instances.get("one").state is State.FAILED


@pytest.mark.parametrize("kind", ["refuse", "full", "die"])
async def test_a_restore_that_the_driver_fails_leaves_no_process(world: World, kind: str) -> None:
    world.cuda.states = {42: "checkpointed", 43: "checkpointed"}
    world.cuda.faults["restore", 42] = kind
    with pytest.raises(DumontError):
        await world.restored("one", a_snapshot())
    assert world.host.released
    assert world.instances.get("one").state is State.FAILED
    assert world.gpus.reservations.reserved(A.uuid) == world.gpus.reservations.reserved(B.uuid) == 0


@pytest.mark.parametrize(
    ("state", "cuda", "expected"),
    [
        (State.PARKED, {42: "checkpointed", 43: "checkpointed"}, State.PARKED),
        (State.PARKED, {42: "checkpointed", 43: "locked"}, State.SERVING),
        (State.PARKING, {42: "checkpointed", 43: "locked"}, State.SERVING),
        (State.CAPTURING, {42: "locked", 43: "running"}, State.SERVING),
        (State.RESUMING, {42: "checkpointed", 43: "checkpointed"}, State.SERVING),
        (State.SERVING, {42: "running", 43: "running"}, State.SERVING),
    ],
)
async def test_a_new_daemon_finds_every_cuda_process_as_it_was_left(
    world: World, state: State, cuda: dict[int, str], expected: State
) -> None:
    host = GpuHost("one")
    host.state = "SERVING" if state is State.SERVING else "QUIESCED"
    world.hosts.found, world.cuda.states = [host], cuda
    world.status.holding[42] = (B.uuid, 6 * GIB)
    world.instances.journal.write(replace(an_instance(state), device="cuda:0", gpu=A.uuid))

    await world.instances.take_over()

    known = world.instances.get("one")
    assert known.state is expected
    if expected is State.SERVING:
        assert set(world.cuda.states.values()) == {"running"}
        # A move may have been under way: where it is, NVML knows.
        assert (known.gpu, host.state) == (B.uuid, "SERVING")
    else:
        assert set(world.cuda.states.values()) == {"checkpointed"}


# Refusals


@pytest.mark.parametrize("sharing", [MIG, MPS])
@pytest.mark.parametrize("job", ["capture", "park"])
async def test_beside_mig_and_mps_an_instance_serves_and_nothing_is_touched(
    world: World, sharing: Sharing, job: str
) -> None:
    world.status.shared = [sharing]
    host = await world.serving()
    with pytest.raises(FailedPrecondition) as refusal:
        await (world.instances.park("one") if job == "park" else world.instances.capture("one", "first"))
    assert refusal.value.reason == f"GPU_{sharing.kind}"
    assert sharing.message in refusal.value.message
    assert refusal.value.metadata.get("gpu", "") == sharing.gpu
    assert host.commands == []
    assert world.cuda.calls == []
    assert world.instances.get("one").state is State.SERVING


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("job", ["capture", "park"])
async def test_where_nothing_can_suspend_cuda_an_instance_starts_and_serves_and_nothing_is_touched(
    world: World, known: bool, job: str
) -> None:
    # Given a node with an old driver, or one that does not even know its GPUs
    host = await world.serving()
    node = world.instances.node
    assert node.gpus is not None
    gpus = replace(node.gpus, cuda=None, unsuspendable="the driver is too old") if known else None
    world.instances.node = replace(node, gpus=gpus)

    with pytest.raises(FailedPrecondition) as refusal:
        await (world.instances.park("one") if job == "park" else world.instances.capture("one", "first"))

    assert refusal.value.reason == "GPU_NOT_SUSPENDABLE"
    assert "too old" in refusal.value.message or not known
    assert host.commands == []
    assert world.instances.get("one").state is State.SERVING


@pytest.mark.parametrize(
    ("weights", "room", "fits"),
    [
        (Weights.DETACHED, 1 * GIB, True),
        (Weights.INCLUDED, 6 * GIB - 1, False),
        (Weights.INCLUDED, 7 * GIB, True),
    ],
)
async def test_room_is_reserved_for_what_comes_from_the_gpu_before_anything_stops(
    world: World, weights: Weights, room: int, fits: bool
) -> None:
    # Given an instance that holds 6 GiB of a GPU, and a disk
    host = await world.serving()
    record = world.instances._record("one")
    record.instance = replace(record.instance, weights=weights)
    disk = DiskReservations(0, lambda folder: FileSystem(1, room, room))
    world.instances.node = replace(world.instances.node, disk=disk)

    # When it is captured, which fails later in this world, where nothing is dumped
    with contextlib.suppress(DumontError):
        await world.instances.capture("one", "first")

    # Then it was asked for anything only if there was room
    assert bool(host.commands) == fits
    assert world.instances.get("one").state is State.SERVING


async def test_a_node_that_cannot_suspend_cuda_is_found_to_be_one(world: World) -> None:
    node = world.instances.node
    assert node.gpus is not None
    unable = replace(node, gpus=replace(node.gpus, cuda=None, unsuspendable="nothing is installed"))
    told = Finding("gpu", False, "the driver is too old", needed=False)

    assert unsuspendable(unable, []) == [Finding("cuda_backend", False, "nothing is installed", needed=False)]
    assert unsuspendable(unable, [told]) == []
    assert unsuspendable(node, []) == []


@pytest.mark.parametrize("sharing", [MIG, MPS])
async def test_beside_mig_and_mps_what_is_parked_stays_parked(world: World, sharing: Sharing) -> None:
    await world.serving()
    await world.instances.park("one")
    world.status.shared = [sharing]
    world.cuda.calls.clear()
    with pytest.raises(FailedPrecondition) as refusal:
        await world.instances.resume("one")
    assert refusal.value.reason == f"GPU_{sharing.kind}"
    assert world.instances.get("one").state is State.PARKED
    assert world.cuda.calls == []


@pytest.mark.parametrize("sharing", [MIG, MPS])
async def test_beside_mig_and_mps_a_restore_is_refused_before_there_is_a_process(
    world: World, sharing: Sharing
) -> None:
    world.status.shared = [sharing]
    with pytest.raises(FailedPrecondition) as refusal:
        await world.restored("one", a_snapshot())
    assert refusal.value.reason == f"GPU_{sharing.kind}"
    assert world.hosts.taken == []


@pytest.mark.parametrize("fact", sorted(FACTS))
async def test_a_node_that_differs_is_refused_by_the_name_of_the_fact_before_there_is_a_process(
    world: World, fact: str
) -> None:
    captured = a_snapshot(compatibility={**FACTS, "weights": "digest", fact: "other"})
    with pytest.raises(FailedPrecondition) as refusal:
        await world.restored("one", captured)
    assert refusal.value.reason == "INCOMPATIBLE"
    assert refusal.value.metadata["fact"] == fact
    assert world.hosts.taken == []


async def test_weights_that_changed_are_refused_before_there_is_a_process(world: World) -> None:
    captured = a_snapshot(compatibility={**FACTS, "weights": "another digest"})
    with pytest.raises(FailedPrecondition) as refusal:
        await world.restored("one", captured)
    assert refusal.value.metadata["fact"] == "weights"
    assert world.hosts.taken == []


async def test_a_wrong_canary_quarantines_the_snapshot_and_ends_the_instance(world: World) -> None:
    world.cuda.states = {42: "checkpointed", 43: "checkpointed"}
    with pytest.raises(DataLoss) as refusal:
        await world.restored("one", a_snapshot(canary=Canary((2,), -0.5)))
    assert refusal.value.reason == "CANARY_MISMATCH"
    assert world.host.released
    assert "first" in world.store.quarantined

"""Instances on GPUs: whole trees suspended or none, refused before anything is touched, placed and moved."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from instances_world import (
    FILES,
    LOADED,
    NOW,
    FakeHost,
    FakeHosts,
    FakeModels,
    a_node,
    an_instance,
    instances_of,
)

from dumont.errors import (
    Aborted,
    DataLoss,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
)
from snapshotd.instances import Instances
from snapshotd.model import Canary, Gpu, Instance, Json, Manifest, Model, Phase, Sharing, Snapshot, State
from snapshotd.relocation import relocate
from tests.fake_cuda import FakeCuda

GIB = 1 << 30
A, B = (Gpu(f"GPU-{name}", "H100", 80 * GIB) for name in "ab")
MODEL = Model("org/name", "causal_lm", Path("/model"), (), 2 * GIB, 512)
FACTS = {
    "cuda": "13.0",
    "gpu_count": "2",
    "gpu_memory": "81920,81920",
    "gpu_model": "H100,H100",
    "nvidia_driver": "580.1",
}
MIG = Sharing("MIG", A.uuid, "MIG is enabled on GPU-a")
MPS = Sharing("MPS", "", "an MPS daemon listens")
CUDA_FAULTS = [("lock", "busy"), ("lock", "die"), ("checkpoint", "refuse"), ("after-checkpoint", "die")]


class GpuHost(FakeHost):
    """A model host with a life: what is asked of it in the wrong state is refused."""

    MOVES: Mapping[str, tuple[str, str]] = {
        "drain": ("SERVING", "DRAINED"),
        "accept": ("DRAINED", "SERVING"),
        "quiesce": ("DRAINED", "QUIESCED"),
        "wake": ("QUIESCED", "AWAKE"),
    }

    def __init__(self, instance: str = "", pid: int = 42) -> None:
        super().__init__(instance)
        self.pid = pid
        self.asked: list[str] = []
        self.environment: Mapping[str, str] = {}
        self.canary = LOADED["canary"]
        # The GPU of each order of weights.
        self.ordered: list[object] = []

    async def launch(self, instance: str, directory: Path, command: Any, environment: Any) -> None:
        await super().launch(instance, directory, command, environment)
        self.environment = environment

    async def restore(self, *arguments: object) -> None:
        await self._do("restore")
        self.instance, self.state = str(arguments[0]), "QUIESCED"

    async def dump(self, images: Path, timeout: float) -> Json:
        await self._do("dump")
        return {"mounts": [], "pipes": {}}

    async def call(self, command: str, timeout: float, **arguments: object) -> Json:
        self.asked.append(command)
        await self._do(command)
        if "gpu" in arguments:
            self.ordered.append(arguments["gpu"])
        if command == "serve":
            assert self.state in ("SERVING", "AWAKE")
            self.state = "SERVING"
        elif command in self.MOVES:
            before, after = self.MOVES[command]
            assert self.state == before, (command, self.state)
            self.state = after
        answers: dict[str, Json] = {
            "load": {**LOADED, "device": "cuda:0"},
            "status": {"state": self.state, "served": False},
            "canary": self.canary,
        }
        return answers.get(command, {})


class GpuHosts(FakeHosts):
    """Each host has a pid of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[GpuHost] = []

    async def take(self) -> GpuHost:
        self.taken.append(GpuHost(pid=42 + 10 * len(self.taken)))
        return self.taken[-1]


@dataclass
class FakeGpuStatus:
    free_bytes: dict[str, int]
    # GPU and bytes of each process.
    holding: dict[int, tuple[str, int]] = field(default_factory=dict)
    shared: list[Sharing] = field(default_factory=list)

    def used_by(self, pids: Collection[int]) -> dict[str, int]:
        used: dict[str, int] = {}
        for pid, (gpu, held) in self.holding.items():
            if pid in pids:
                used[gpu] = used.get(gpu, 0) + held
        return used

    def free(self, gpu: str) -> int:
        return self.free_bytes[gpu]

    def sharing(self) -> list[Sharing]:
        return self.shared


class ReadyLoader:
    async def ready(self) -> bool:
        return True


class GpuModels(FakeModels):
    async def resolve(self, name: str, engine: str = "") -> Model:
        return MODEL


class FakeStore:
    def __init__(self) -> None:
        self.staged: set[str] = set()
        self.quarantined: dict[str, str] = {}

    async def stage(self, snapshot: str) -> Path:
        self.staged.add(snapshot)
        return Path("/nowhere")

    async def discard(self, snapshot: str) -> None:
        self.staged.discard(snapshot)

    async def verify(self, snapshot: Snapshot) -> None:
        return

    async def quarantine(self, snapshot: str, reason: str) -> None:
        self.quarantined[snapshot] = reason

    def images(self, snapshot: Snapshot) -> Path:
        return Path("/images")


@dataclass
class World:
    instances: Instances
    hosts: GpuHosts
    cuda: FakeCuda
    status: FakeGpuStatus
    store: FakeStore
    family: dict[int, list[int]]

    @property
    def host(self) -> GpuHost:
        return self.hosts.taken[0]

    async def serving(self, gpu: str = "") -> GpuHost:
        """An instance ``one`` that serves, with a child that computes and one that does not."""
        self.instances.admit(an_instance(State.STARTING))
        await self.instances.start("one", MODEL, gpu)
        self.status.holding[42] = (self.instances.get("one").gpu, 6 * GIB)
        self.host.asked.clear()
        return self.host

    async def restored(self, name: str, snapshot: Snapshot, gpu: str = "") -> Instance:
        self.instances.admit(replace(an_instance(State.RESTORING), id=name))
        return await self.instances.restore(name, snapshot, gpu=gpu)

    def runs(self) -> bool:
        return set(self.cuda.states.values()) == {"running"} and self.host.state == "SERVING"


@pytest.fixture
def world(tmp_path: Path) -> World:
    hosts, store = GpuHosts(), FakeStore()
    cuda = FakeCuda((42, 43))
    status = FakeGpuStatus({A.uuid: 80 * GIB, B.uuid: 80 * GIB})
    family = {42: [42, 43, 44]}
    node = a_node(
        tmp_path,
        hosts,
        store=store,
        models=GpuModels(),
        cuda=cuda,
        gpus=(A, B),
        gpu_facts=FACTS,
        gpu_status=status,
        family=lambda pid: family.get(pid, [pid]),
    )
    return World(instances_of(node), hosts, cuda, status, store, family)


def a_snapshot(**facts: Any) -> Snapshot:
    manifest = Manifest(
        id="first",
        deployment="deployments/qa",
        model=MODEL.name,
        engine=MODEL.engine,
        device="cuda:0",
        create_time=NOW,
        source_pause_seconds=1.0,
        phases=(Phase("dump", 1.0),),
        canary=Canary((1,), -0.5),
        compatibility={**FACTS, "weights": "digest"},
        weight_files=FILES,
        mounts=(),
        pipes={},
        files=(),
        gpus=(A.uuid, B.uuid),
        gpu=A.uuid,
        gpu_bytes=6 * GIB,
    )
    return Snapshot(replace(manifest, **facts), "digest")


# Trees


async def test_a_park_suspends_every_cuda_process_of_the_instance_and_a_resume_revives_them(
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
    assert world.instances.node.room.promised(A.uuid) == world.instances.node.room.promised(B.uuid) == 0


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
    assert host.asked == []
    assert world.cuda.calls == []
    assert world.instances.get("one").state is State.SERVING


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
    assert world.instances.node.room.promised(A.uuid) == world.instances.node.room.promised(B.uuid) == 0


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
    moved = await relocate(world.instances, "one", B.uuid)
    assert (moved.state, moved.gpu, moved.device) == (State.SERVING, B.uuid, "cuda:0")
    assert world.cuda.devices == [{A.uuid: B.uuid, B.uuid: A.uuid}] * 2
    assert world.runs()

    # And back: it is parked with what it holds there.
    world.status.holding[42] = (B.uuid, 7 * GIB)
    back = await relocate(world.instances, "one", "0")
    assert (back.gpu, back.gpu_bytes) == (A.uuid, 7 * GIB)
    assert world.cuda.devices[2:] == [{A.uuid: B.uuid, B.uuid: A.uuid}] * 2


async def test_weights_are_brought_to_the_gpu_that_the_process_comes_back_on(world: World) -> None:
    world.instances.node = replace(world.instances.node, loader=ReadyLoader())
    host = await world.serving(gpu="0")
    await relocate(world.instances, "one", "1")
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


async def test_where_it_is_already_it_stays_untouched(world: World) -> None:
    host = await world.serving()
    assert (await relocate(world.instances, "one", "0")).state is State.SERVING
    assert host.asked == []


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
        await relocate(world.instances, "one", gpu)
    assert refusal.value.reason == reason
    assert host.asked == []
    assert world.cuda.calls == []
    assert world.instances.get("one").state is State.SERVING
    assert world.instances.node.room.promised(B.uuid) == 0


async def test_a_move_whose_room_is_taken_meanwhile_ends_where_it_began(world: World) -> None:
    host = await world.serving()
    host.gates["quiesce"] = gate = asyncio.Event()
    moving = asyncio.create_task(relocate(world.instances, "one", "1"))
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
    host.gates["quiesce"] = gate = asyncio.Event()
    moving = asyncio.create_task(relocate(world.instances, "one", "1"))
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
        await relocate(world.instances, "one", "1")
    assert refusal.value.reason == "CUDA_FAILED"
    assert host.released
    assert world.instances.get("one").state is State.FAILED


async def test_what_runs_on_the_cpu_goes_to_no_gpu(world: World) -> None:
    world.instances.admit(an_instance(State.STARTING))
    await world.instances.start("one", MODEL)
    record = world.instances._record("one")
    record.instance = replace(record.instance, device="cpu", gpu="")
    with pytest.raises(FailedPrecondition) as refusal:
        await relocate(world.instances, "one", "1")
    assert refusal.value.reason == "NO_GPU"

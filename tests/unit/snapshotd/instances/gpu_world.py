"""A node with two GPUs and no hardware: hosts with a life, a driver that fails when told to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from snapshotd.instances.manager import Instances
from snapshotd.jobs.context import Gpus
from snapshotd.jobs.executor import Action
from snapshotd.model import Canary, Gpu, Instance, Json, Manifest, Model, Phase, Sharing, Snapshot, State
from tests.fakes.fake_cuda import FakeCuda
from tests.unit.snapshotd.instances.instances_world import (
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
        "pause": ("SERVING", "PAUSED"),
        "continue": ("PAUSED", "SERVING"),
        "quiesce": ("DRAINED", "QUIESCED"),
        "wake": ("QUIESCED", "AWAKE"),
    }

    def __init__(self, instance: str = "", pid: int = 42) -> None:
        super().__init__(instance)
        self.pid = pid
        self.commands: list[str] = []
        self.environment: Mapping[str, str] = {}
        self.canary = LOADED["canary"]
        # The GPU of each order of weights.
        self.ordered: list[object] = []

    async def launch(
        self, instance: str, directory: Path, command: Any, environment: Any, engine: str = ""
    ) -> None:
        await super().launch(instance, directory, command, environment, engine)
        self.environment = environment

    async def restore(self, *arguments: object) -> None:
        await self._do("restore")
        self.instance, self.state = str(arguments[0]), "QUIESCED"

    async def dump(self, images: Path, timeout: float) -> Json:
        assert self.prepared
        await self._do("dump")
        self.prepared = False
        return {"mounts": [], "pipes": {}}

    async def call(self, command: str, timeout: float, **arguments: Any) -> Json:
        self.commands.append(command)
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
        self.taken: list[GpuHost] = []  # type: ignore[assignment]

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
        self.pins: dict[str, str] = {}

    async def stage(self, snapshot: str) -> Path:
        self.staged.add(snapshot)
        return Path("/nowhere")

    async def discard(self, snapshot: str) -> None:
        self.staged.discard(snapshot)

    async def get(self, snapshot: str) -> Snapshot:
        return replace(a_snapshot(id=snapshot), quarantine_reason=self.quarantined.get(snapshot, ""))

    async def verify(self, snapshot: Snapshot) -> None:
        return

    async def quarantine(self, snapshot: str, reason: str) -> None:
        self.quarantined[snapshot] = reason

    def pin(self, owner: str, snapshot: str) -> None:
        self.pins[owner] = snapshot

    async def images(self, snapshot: Snapshot) -> Path:
        return Path("/images")

    async def unpin(self, owner: str) -> None:
        self.pins.pop(owner, None)


@dataclass
class World:
    instances: Instances
    hosts: GpuHosts
    cuda: FakeCuda
    status: FakeGpuStatus
    store: FakeStore
    process_tree: dict[int, list[int]]

    @property
    def host(self) -> GpuHost:
        return self.hosts.taken[0]

    @property
    def gpus(self) -> Gpus:
        assert self.instances.node.gpus is not None
        return self.instances.node.gpus

    async def serving(self, gpu: str = "") -> GpuHost:
        """An instance ``one`` that serves, with a child that computes and one that does not."""
        self.instances.admit(an_instance(State.STARTING))
        await self.instances.start("one", MODEL, gpu)
        self.status.holding[42] = (self.instances.get("one").gpu, 6 * GIB)
        self.host.commands.clear()
        return self.host

    async def restored(
        self, name: str, snapshot: Snapshot, fetch: Action | None = None, gpu: str = ""
    ) -> Instance:
        self.instances.admit(replace(an_instance(State.RESTORING), id=name))
        return await self.instances.restore(name, snapshot, fetch, gpu)

    def runs(self) -> bool:
        return set(self.cuda.states.values()) == {"running"} and self.host.state == "SERVING"


def a_world(tmp_path: Path) -> World:
    """Two empty GPUs, and hosts that are trees of two processes on CUDA."""
    hosts, store = GpuHosts(), FakeStore()
    cuda = FakeCuda((42, 43))
    status = FakeGpuStatus({A.uuid: 80 * GIB, B.uuid: 80 * GIB})
    process_tree = {42: [42, 43, 44]}
    node = a_node(
        tmp_path,
        hosts,
        store=store,
        models=GpuModels(),
        gpus=Gpus((A, B), FACTS, status, cuda),
        process_tree=lambda pid: process_tree.get(pid, [pid]),
    )
    return World(instances_of(node), hosts, cuda, status, store, process_tree)


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

"""A real node without its gRPC server: real CRIU, real shims, a real model."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import grpc

from dumont.errors import DumontError
from dumont.model_host.v1 import model_host_service_pb2 as pb2
from dumont.model_host.v1 import model_host_service_pb2_grpc as pb2_grpc
from snapshotd.adapters.criu_shim.host import ShimHost
from snapshotd.assembly import assemble
from snapshotd.config import Settings
from snapshotd.failpoints import Failpoints
from snapshotd.model import Instance, Json, Snapshot, State, Weights
from snapshotd.preflight import find_criu
from snapshotd.system.freezer import cgroup2_root

PROMPT = "The capital of France is"


@dataclass
class NodeUnderTest:
    """Starts, captures and restores, and asks the model hosts themselves."""

    state_dir: Path
    model: Path
    # Bytes; 0: it has no weight cache.
    weight_budget: int = 0
    failpoints: Failpoints = field(default_factory=Failpoints)
    # "auto" on a machine with a GPU.
    device: Literal["auto", "cpu"] = "cpu"
    cuda_backend: Literal["auto", "driver", "cli"] = "auto"
    # Empty: the one that the model calls for.
    engine: str = ""
    engine_options: Json = field(default_factory=dict)
    engine_python: str = ""
    # What the captured source answered, and the process that did.
    answer: list[int] = field(default_factory=list)
    source_pid: int = 0
    # Every shim there was: other tests may run on this machine at the same time.
    shims: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        criu, _ = find_criu()
        assert criu is not None
        settings = Settings(
            state_dir=self.state_dir,
            models_dir=self.model.parent,
            weight_cache_bytes=self.weight_budget,
            threads=2,
            device=self.device,
            cuda_backend=self.cuda_backend,
            engine_python=self.engine_python,
        )
        self._stack = AsyncExitStack()
        parts = assemble(settings, criu, self.failpoints, self._stack)
        self.node, self.instances = parts.node, parts.instances
        self.store, self.hosts, self.weights = parts.node.store, parts.hosts, parts.weights
        self.cuda, self.loader = parts.cuda, parts.loader
        self._start_shim, self.hosts._start = self.hosts._start, self._recorded  # type: ignore[method-assign]

    async def _recorded(self) -> ShimHost:
        host = await self._start_shim()
        self.shims.add(host.shim)
        return host

    async def start(
        self,
        instance: str,
        model_dir: Path | None = None,
        weights: Weights = Weights.DETACHED,
        gpu: str = "",
    ) -> Instance:
        """Of another model than this node's if ``model_dir`` names one."""
        name = str(model_dir or self.model)
        model = await self.node.models.resolve(name, self.engine)
        new = _new(instance, name, model.engine, State.STARTING)
        self.instances.admit(replace(new, weights=weights, engine_options=self.engine_options))
        return await self.instances.start(instance, model, gpu)

    async def restore(self, instance: str, snapshot: Snapshot, gpu: str = "") -> Instance:
        manifest = snapshot.manifest
        new = _new(instance, manifest.model, manifest.engine, State.RESTORING, manifest.id)
        self.instances.admit(replace(new, weights=manifest.weights, engine_options=manifest.engine_options))
        return await self.instances.restore(instance, snapshot, gpu=gpu)

    async def draws(self, instance: str) -> Json:
        """One number from each of its random generators."""
        host = self.instances._record(instance).host
        assert host is not None
        return await host.call("draws", 10.0)

    async def generate(self, instance: str, prompt: str = PROMPT) -> list[int]:
        """Its greedy answer, as tokens, from its own socket."""
        async with self.model_host(instance) as stub:
            request = pb2.GenerateRequest(prompt=prompt, max_new_tokens=6)
            return [token async for answer in stub.Generate(request) for token in answer.chunk.token_ids]

    @contextlib.asynccontextmanager
    async def model_host(self, instance: str) -> AsyncIterator[pb2_grpc.ModelHostServiceAsyncStub]:
        """The API of an instance's model host, on its own socket."""
        directory = os.open(self.node.instance_directory(instance), os.O_PATH)
        try:
            async with grpc.aio.insecure_channel(f"unix:/proc/self/fd/{directory}/host.sock") as channel:
                stub: pb2_grpc.ModelHostServiceAsyncStub = pb2_grpc.ModelHostServiceStub(channel)
                yield stub
        finally:
            os.close(directory)

    async def stop_all(self) -> None:
        await self.instances.stop_all()

    async def close(self) -> None:
        await self.instances.stop_all()
        await self._stack.aclose()

    async def remains(self) -> dict[str, list[str]]:
        """What this node holds of the machine, by kind; the spare shim is waited for and left out."""
        spare = await asyncio.shield(self.hosts._spare) if self.hosts._spare else None
        shims = sorted(path.name for path in (self.state_dir / "shims").glob("*.sock"))
        groups = cgroup2_root()
        return {
            "instances": sorted(path.name for path in (self.state_dir / "instances").iterdir()),
            "journal": sorted(path.name for path in (self.state_dir / "journal").iterdir()),
            "staged": sorted(path.name for path in (self.state_dir / "snapshots").glob(".staged-*")),
            "shims": [name for name in shims if spare is None or name != f"{spare.shim}.sock"],
            "mounts": [
                line for line in Path("/proc/mounts").read_text().splitlines() if str(self.state_dir) in line
            ],
            "processes": sorted(_model_hosts(self.state_dir)),
            "page servers": sorted(_page_servers(self.state_dir)),
            "groups": sorted(self.shims & {path.name for path in (groups / "dumont").glob("*/")})
            if groups
            else [],
        }


def _new(instance: str, model: str, engine: str, state: State, snapshot: str = "") -> Instance:
    return Instance(instance, "deployments/test", model, engine, state, datetime.now(UTC), snapshot=snapshot)


def _model_hosts(state_dir: Path) -> list[str]:
    """Pids of all model hosts whose instance directory lies below ``state_dir``, whoever is their parent."""
    # As a mount names it: without the path at which its file system is mounted.
    below = "/".join(state_dir.parts[-2:]) + "/instances/"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            mounts = path.with_name("mountinfo")
            if b"\0model_host\0" in path.read_bytes() and below in mounts.read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def _page_servers(state_dir: Path) -> list[str]:
    """Pids of all that write below ``state_dir``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes()
            if b".page_server\0" in command and str(state_dir).encode() in command:
                found.append(path.parent.name)
    return found


async def refused(work: object) -> DumontError:
    """The error that ``work`` ends with."""
    try:
        await work  # type: ignore[misc]
    except DumontError as error:
        return error
    raise AssertionError("it was not refused")

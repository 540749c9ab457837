"""Nodes in memory; every call is recorded, and may be made to fail or to wait."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from controller.model import (
    Capacity,
    InstanceState,
    NodeModel,
    Phase,
    Pruned,
    Report,
    ResolvedModel,
    Snapshot,
    Verified,
    Weights,
)
from controller.ports import Change, Clock, ListedSnapshots, Removed, Synchronized
from controller.room import OFF_GPU
from dumont.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

# What a node takes for each job, in its phases; no time passes.
PHASES = {"start": ("load", 8.0), "restore": ("restore", 0.5), "resume": ("thaw", 0.2)}


@dataclass
class MemoryNode:
    """One node's truth, which outlives controllers and lost connections."""

    instances: dict[str, Report] = field(default_factory=dict)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    watchers: list[asyncio.Queue[Change | DumontError]] = field(default_factory=list)
    up: bool = True
    # Whether it reaches the object store that all nodes share.
    store: bool = False
    # The memory of its GPUs by UUID, and the most that instances have ever taken of each.
    gpus: dict[str, int] = field(default_factory=dict)
    most_taken: dict[str, int] = field(default_factory=dict)

    def taken(self, gpu: str, besides: str = "") -> int:
        """What instances take of a GPU."""
        on = (r for r in self.instances.values() if r.gpu == gpu and r.id != besides)
        return sum(report.gpu_bytes for report in on if report.state not in OFF_GPU)


class MemoryNodes:
    """Nodes whose every call is written down and may be made to fail or to wait.

    ``calls`` holds (method, node, argument) in order. ``fail("restore", error)`` fails the next
    restore before it does anything; ``hold("start")`` makes starts wait for the returned event.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.world: dict[str, MemoryNode] = {}
        self.bucket: dict[str, Snapshot] = {}
        self.stages: dict[str, str] = {}
        self.deleted: dict[str, Snapshot] = {}
        # Why nodes cannot list the bucket.
        self.store_silence = ""
        self.calls: list[tuple[str, str, str]] = []
        self.cancelled: list[tuple[str, str, str]] = []
        self.timeouts: list[float | None] = []
        # Bytes of the weights of models.
        self.weights_bytes: dict[str, int] = {}
        # What every instance reports that it computes at once.
        self.capacity: Capacity | None = None
        # Bytes of GPU memory and of RAM that an instance takes, by deployment.
        self.sizes: dict[str, tuple[int, int]] = {}
        # Where each started instance was told to have its weights.
        self.weights: dict[str, Weights] = {}
        # Instances that somebody tried to capture after a prompt had entered them.
        self.spoiled: list[str] = []
        # Of all answers, the frames that were read.
        self.frames_read = 0
        self.frames: list[bytes] = [b"\x12\x03\n\x01a", b"\x1a\x00"]
        self.models: dict[str, str] = {}
        # Set while a controller dies: what it had begun goes on, as on a real node.
        self.abandoned = False
        self._faults: defaultdict[str, deque[DumontError]] = defaultdict(deque)
        self._holds: dict[str, asyncio.Event] = {}
        self._called = asyncio.Event()
        self._creating: set[str] = set()
        self._disconnected: set[str] = set()

    # Scripting

    def add_node(self, node: str) -> MemoryNode:
        return self.world.setdefault(node, MemoryNode())

    def fail(self, method: str, *errors: DumontError) -> None:
        """The next calls of ``method`` fail with these, one each."""
        self._faults[method].extend(errors)

    def forgive(self) -> None:
        """No call fails any more."""
        self._faults.clear()

    def hold(self, method: str) -> asyncio.Event:
        """Calls of ``method`` wait, after they were written down, until the event is set."""
        return self._holds.setdefault(method, asyncio.Event())

    def hold_no_more(self, method: str) -> None:
        """Later calls of ``method`` do not wait; those that wait already still do."""
        self._holds.pop(method, None)

    def release_all(self) -> None:
        """Nothing is held any more."""
        for event in self._holds.values():
            event.set()
        self._holds.clear()

    def named(self, method: str) -> list[tuple[str, str, str]]:
        """The calls of ``method`` so far."""
        return [call for call in self.calls if call[0] == method]

    async def called(self, method: str, count: int = 1) -> None:
        """Wait until ``method`` has been called ``count`` times."""
        while len(self.named(method)) < count:
            await self._called.wait()

    def tell(self, node: str, report: Report) -> None:
        """An instance changed by itself."""
        self.world[node].instances[report.id] = report
        self._publish(node, report)

    def lose(self, node: str, instance: str) -> None:
        """An instance is gone without a word from us."""
        self.world[node].instances.pop(instance, None)
        self._publish(node, Removed(instance))

    def finish_starts(self, node: str) -> None:
        """Starts whose caller is gone come to their end, as on a real node."""
        for report in list(self.world[node].instances.values()):
            if report.state is InstanceState.STARTING and report.id not in self._creating:
                self.tell(node, replace(report, state=InstanceState.SERVING))

    def cut(self, node: str) -> None:
        """The node stops answering; what runs on it goes on."""
        self.world[node].up = False
        for queue in self.world[node].watchers:
            queue.put_nowait(_silent(node))

    def restore_contact(self, node: str) -> None:
        self.world[node].up = True

    # The port

    async def connect(self, node: str, endpoint: str) -> None:
        self._disconnected.discard(node)

    async def disconnect(self, node: str) -> None:
        self._disconnected.add(node)

    async def list_models(self, node: str) -> tuple[NodeModel, ...]:
        await self._call("list_models", node, "")
        return tuple(
            NodeModel(model, node, engine, self.weights_bytes.get(model, 0))
            for model, engine in self.models.items()
        )

    async def resolve_model(self, node: str, model: str, engine: str) -> ResolvedModel:
        await self._call("resolve_model", node, model)
        found = engine or self.models.get(model, "causal_lm")
        return ResolvedModel(model, found, self.weights_bytes.get(model, 0))

    async def watch(self, node: str) -> AsyncGenerator[Change]:
        known = self._reach(node)
        queue: asyncio.Queue[Change | DumontError] = asyncio.Queue()
        known.watchers.append(queue)
        try:
            for report in list(known.instances.values()):
                yield report
            yield Synchronized()
            while True:
                change = await queue.get()
                if isinstance(change, DumontError):
                    raise change
                yield change
        finally:
            known.watchers.remove(queue)

    async def get_instance(self, node: str, instance: str) -> Report:
        await self._call("get_instance", node, instance)
        return self._find(node, instance)

    async def list_snapshots(self, node: str) -> ListedSnapshots:
        await self._call("list_snapshots", node, "")
        self._reach(node)
        found = self._snapshots(node)
        if self.store_silence:
            found = [snapshot for snapshot in found if snapshot.local]
        return ListedSnapshots(tuple(found), self.store_silence)

    async def start(
        self,
        node: str,
        instance: str,
        deployment: str,
        model: str,
        engine: str,
        weights: Weights,
        engine_options: Mapping[str, Any],
        gpu: str = "",
    ) -> Report:
        self.weights[instance] = weights
        report = Report(
            instance,
            deployment,
            InstanceState.STARTING,
            weights=weights,
            model=model,
            engine=engine,
            engine_options=engine_options,
            gpu=gpu,
        )
        return await self._create("start", node, report)

    async def restore(
        self,
        node: str,
        instance: str,
        deployment: str,
        snapshot: str,
        manifest_digest: str,
        gpu: str = "",
    ) -> Report:
        report = Report(instance, deployment, InstanceState.STARTING, snapshot=snapshot, gpu=gpu)
        known = {held.id: held for held in self._snapshots(node)}
        if snapshot not in known:
            raise NotFound("SNAPSHOT_NOT_FOUND", f"there is no snapshots/{snapshot}")
        if manifest_digest and known[snapshot].manifest_digest != manifest_digest:
            raise DataLoss("MANIFEST_REPLACED", f"snapshots/{snapshot} is another one")
        source = known[snapshot]
        report = replace(
            report,
            weights=source.weights,
            model=source.model,
            engine=source.engine,
            engine_options=source.engine_options,
        )
        return await self._create("restore", node, report)

    async def stage(self, node: str, instance: str) -> str:
        return self.stages.get(instance, "")

    async def capture(self, node: str, instance: str, snapshot: str) -> Snapshot:
        source = self._find(node, instance)
        if any(instance in argument for method, _, argument in self.calls if method in {"generate", "embed"}):
            self.spoiled.append(instance)
            raise FailedPrecondition("INSTANCE_SERVED", f"a prompt has entered instances/{instance}")
        if snapshot in {known.id for known in self._snapshots(node)}:
            raise AlreadyExists("SNAPSHOT_EXISTS", f"snapshots/{snapshot} exists", field="snapshot_id")
        self.tell(node, replace(source, state=InstanceState.CAPTURING))
        try:
            await self._call("capture", node, instance)
        finally:
            if instance in self.world[node].instances:
                self.tell(node, source)
        now = self._clock.moment().wall
        made = Snapshot(
            snapshot,
            source.deployment,
            node,
            now,
            weights=source.weights,
            model=source.model,
            engine=source.engine,
            engine_options=source.engine_options,
            manifest_digest=f"digest of {snapshot} at {now}",
        )
        self.world[node].snapshots[snapshot] = made
        return made

    async def park(self, node: str, instance: str) -> Report:
        await self._call("park", node, instance)
        return self._move(node, instance, InstanceState.SERVING, InstanceState.PARKED)

    async def resume(self, node: str, instance: str, gpu: str = "") -> Report:
        await self._call("resume", node, instance)
        known = self._find(node, instance)
        if known.state is InstanceState.PARKED:
            known = replace(known, gpu=gpu or known.gpu, phases=(Phase(*PHASES["resume"]),))
            self._take(node, replace(known, state=InstanceState.SERVING))
            self.world[node].instances[instance] = known
        return self._move(node, instance, InstanceState.PARKED, InstanceState.SERVING)

    async def move(self, node: str, instance: str, gpu: str) -> Report:
        # As on a real node, it cannot answer on the way.
        source = self._find(node, instance)
        if source.state is not InstanceState.SERVING:
            raise FailedPrecondition("ILLEGAL_TRANSITION", f"instances/{instance} is {source.state.value}")
        if not source.device.startswith("cuda"):
            raise FailedPrecondition("NO_GPU", f"instances/{instance} runs on the CPU")
        known = self.world[node]
        if known.gpus and known.taken(gpu) + source.gpu_bytes > known.gpus[gpu]:
            raise ResourceExhausted("GPU_MEMORY", f"{gpu} has no room for instances/{instance}")
        self.tell(node, replace(source, state=InstanceState.PARKING))
        try:
            await self._call("move", node, instance)
            source = replace(source, gpu=gpu)
        finally:
            if instance in self.world[node].instances:
                self.tell(node, source)
        return source

    async def stop(self, node: str, instance: str) -> None:
        await self._call("stop", node, instance)
        self._find(node, instance)
        self.lose(node, instance)

    async def delete_snapshot(self, node: str, snapshot: str) -> None:
        await self._call("delete_snapshot", node, snapshot)
        published = self.bucket.pop(snapshot, None)
        if published is not None:
            self.deleted[snapshot] = published
        if self.world[node].snapshots.pop(snapshot, None) is None and published is None:
            raise NotFound("SNAPSHOT_NOT_FOUND", f"there is no snapshots/{snapshot}")

    async def undelete_snapshot(self, node: str, snapshot: str) -> Snapshot:
        await self._call("undelete_snapshot", node, snapshot)
        if snapshot not in self.deleted:
            raise NotFound("SNAPSHOT_NOT_DELETED", f"nothing is left of snapshots/{snapshot}")
        self.bucket[snapshot] = self.deleted[snapshot]
        return await self.get_snapshot(node, snapshot)

    async def get_snapshot(self, node: str, snapshot: str) -> Snapshot:
        await self._call("get_snapshot", node, snapshot)
        for known in self._snapshots(node):
            if known.id == snapshot:
                return known
        raise NotFound("SNAPSHOT_NOT_FOUND", f"there is no snapshots/{snapshot}")

    async def publish(self, node: str, snapshot: str) -> Snapshot:
        await self._call("publish", node, snapshot)
        if snapshot not in self.world[node].snapshots:
            raise NotFound("SNAPSHOT_NOT_FOUND", f"there is no snapshots/{snapshot}")
        self.bucket[snapshot] = self.world[node].snapshots[snapshot]
        return next(known for known in self._snapshots(node) if known.id == snapshot)

    async def prefetch(self, node: str, snapshot: str, manifest_digest: str) -> Snapshot:
        await self._call("prefetch", node, snapshot)
        found = await self.get_snapshot(node, snapshot)
        if manifest_digest and found.manifest_digest != manifest_digest:
            raise DataLoss("MANIFEST_REPLACED", f"snapshots/{snapshot} is another one")
        self.world[node].snapshots[snapshot] = replace(found, local=True)
        return await self.get_snapshot(node, snapshot)

    async def verify(self, node: str, snapshot: str) -> Verified:
        await self._call("verify", node, snapshot)
        known = await self.get_snapshot(node, snapshot)
        return Verified(known.size_bytes if known.local else 0, known.size_bytes if known.published else 0)

    async def prune(self, node: str, dry_run: bool) -> Pruned:
        await self._call("prune", node, "dry run" if dry_run else "")
        return Pruned((), 0, 0, len(self.bucket))

    async def stream_logs(
        self, node: str, instance: str, tail_lines: int, follow: bool
    ) -> AsyncGenerator[bytes]:
        await self._call("stream_logs", node, instance)
        yield b"loaded\n"

    def generate(self, node: str, request: bytes, timeout: float | None) -> _MemoryFrames:
        self.timeouts.append(timeout)
        return _MemoryFrames(self, ("generate", node, request.decode("latin-1")))

    async def embed(self, node: str, request: bytes, timeout: float | None) -> bytes:
        self.timeouts.append(timeout)
        await self._call("embed", node, request.decode("latin-1"))
        return b"".join(self.frames)

    async def close(self) -> None:
        return None

    # Inside

    def _snapshots(self, node: str) -> list[Snapshot]:
        """What the node holds, and what is published if it has a store."""
        known = self.world[node]
        if not known.store:
            return list(known.snapshots.values())
        held = {key: replace(value, published=key in self.bucket) for key, value in known.snapshots.items()}
        published = {
            key: replace(value, node=node, local=False, published=True) for key, value in self.bucket.items()
        }
        return list((published | held).values())

    async def _create(self, method: str, node: str, report: Report) -> Report:
        known = self._reach(node)
        unknown = report.gpu not in ("", *known.gpus)
        report = self._sized(node, report)
        if report.id not in known.instances:
            self.tell(node, replace(report, create_time=self._clock.moment().wall))
        self._creating.add(report.id)
        try:
            await self._call(method, node, report.snapshot or report.id)
            if unknown:
                raise InvalidArgument("GPU_UNKNOWN", f"this node has no GPU {report.gpu}", field="gpu")
        except BaseException as error:
            if getattr(error, "reason", "") != "NODE_UNAVAILABLE" and not self.abandoned:
                self.tell(node, replace(report, state=InstanceState.FAILED))
            raise
        finally:
            self._creating.discard(report.id)
        phases = (Phase(*PHASES[method]),)
        serving = replace(known.instances[report.id], state=InstanceState.SERVING, phases=phases)
        self._take(node, serving)
        self.tell(node, serving)
        return serving

    def _sized(self, node: str, report: Report) -> Report:
        """The instance on one of the node's GPUs, if it has any, with its deployment's size."""
        gpu_bytes, ram_bytes = self.sizes.get(report.deployment, (0, 0))
        report = replace(report, capacity=self.capacity)
        known = self.world[node]
        if not known.gpus:
            return replace(report, ram_bytes=ram_bytes, device="cpu")
        freest = max(known.gpus, key=lambda gpu: known.gpus[gpu] - known.taken(gpu))
        gpu = report.gpu or freest
        return replace(report, gpu=gpu, gpu_bytes=gpu_bytes, ram_bytes=ram_bytes, device="cuda:0")

    def _take(self, node: str, report: Report) -> None:
        """Take memory of the GPU. Raises: ResourceExhausted, there is too little."""
        known = self.world[node]
        if not report.gpu:
            return
        taken = known.taken(report.gpu, besides=report.id) + report.gpu_bytes
        if taken > known.gpus[report.gpu]:
            self.tell(node, replace(report, state=InstanceState.FAILED))
            free = known.gpus[report.gpu] - taken + report.gpu_bytes
            raise ResourceExhausted(
                "GPU_MEMORY",
                f"{report.gpu} has no room for instances/{report.id}",
                metadata={
                    "gpu": report.gpu,
                    "free_bytes": str(free),
                    "needed_bytes": str(report.gpu_bytes),
                },
            )
        known.most_taken[report.gpu] = max(taken, known.most_taken.get(report.gpu, 0))

    async def _call(self, method: str, node: str, argument: str) -> None:
        call = (method, node, argument)
        self.calls.append(call)
        called, self._called = self._called, asyncio.Event()
        called.set()
        self._reach(node)
        if method in self._holds:
            try:
                await self._holds[method].wait()
            except asyncio.CancelledError:
                self.cancelled.append(call)
                raise
        await self._fault(method)
        self._reach(node)

    async def _fault(self, method: str) -> None:
        await asyncio.sleep(0)
        if method.startswith("frame") and method in self._holds:
            await self._holds[method].wait()
        if self._faults[method]:
            raise self._faults[method].popleft()

    def _reach(self, node: str) -> MemoryNode:
        known = self.world.get(node)
        if known is None or not known.up or node in self._disconnected:
            raise _silent(node)
        return known

    def _find(self, node: str, instance: str) -> Report:
        known = self._reach(node).instances.get(instance)
        if known is None:
            raise NotFound("INSTANCE_NOT_FOUND", f"there is no instances/{instance}")
        return known

    def _move(self, node: str, instance: str, before: InstanceState, after: InstanceState) -> Report:
        found = self._find(node, instance)
        if found.state is not before:
            raise FailedPrecondition("ILLEGAL_TRANSITION", f"instances/{instance} is {found.state.value}")
        moved = replace(found, state=after)
        self.tell(node, moved)
        return moved

    def _publish(self, node: str, change: Change) -> None:
        for queue in self.world[node].watchers:
            queue.put_nowait(change)


class _MemoryFrames:
    """An answer under way; one that is cancelled before its end is written down."""

    def __init__(self, nodes: MemoryNodes, call: tuple[str, str, str]) -> None:
        self._nodes = nodes
        self._call = call
        self._ended = False
        self._cancelled = asyncio.Event()
        self._frames = self._answer()

    async def read(self) -> bytes | None:
        reading = asyncio.ensure_future(anext(self._frames, None))
        waits = (reading, asyncio.ensure_future(self._cancelled.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._cancelled.is_set():
                raise Cancelled("CALL_CANCELLED", "the call was cancelled from this side")
            return await reading
        except DumontError:
            self._ended = True
            raise
        finally:
            for wait in waits:
                wait.cancel()

    def cancel(self) -> None:
        if not self._ended and not self._cancelled.is_set():
            self._nodes.cancelled.append(self._call)
        self._cancelled.set()

    async def _answer(self) -> AsyncGenerator[bytes]:
        frames = tuple(self._nodes.frames)
        await self._nodes._call(*self._call)
        for number, frame in enumerate(frames):
            self._nodes.frames_read += 1
            yield frame
            await self._nodes._fault(f"frame {number}")
        self._ended = True


def _silent(node: str) -> Unavailable:
    return Unavailable("NODE_UNAVAILABLE", f"nodes/{node} does not answer", retry_after=1.0)

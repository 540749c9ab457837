"""The jobs of a node, each an ordered list of named steps: start, capture, restore, park, resume, stop.

Read a list from top to bottom and you have read the job. What a step leaves behind, its ``undo`` takes
away; the executor runs them. Nothing here knows about gRPC, requests or other instances.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import structlog

from dumont.errors import Aborted, DataLoss, DumontError, FailedPrecondition, Internal
from snapshotd import compatibility
from snapshotd.cuda import tree
from snapshotd.executor import Action, Step
from snapshotd.images.compact import check, compact
from snapshotd.images.format import ImageFormat
from snapshotd.model import Canary, Gpu, Instance, Json, Manifest, Model, Phase, Snapshot, State
from snapshotd.ports import Clock, Cuda, Host, Hosts, Models, SnapshotStore

log = structlog.get_logger(__name__)

SOCKET = "/run/dumont/host.sock"


@dataclass(frozen=True)
class Deadlines:
    """Seconds after which a step counts as failed."""

    load: float = 1800.0
    drain: float = 30.0
    quiesce: float = 30.0
    cuda_lock: float = 10.0
    dump: float = 600.0
    restore: float = 120.0
    wake: float = 60.0
    canary: float = 60.0
    serve: float = 10.0


@dataclass(frozen=True)
class HostSettings:
    """How model hosts run on this node. From the node's configuration, never from a snapshot."""

    command: Sequence[str]
    environment: Mapping[str, str]
    device: str = "auto"
    max_queue: int = 64
    max_new_tokens: int = 4096


@dataclass(frozen=True)
class Node:
    """What the jobs work with."""

    hosts: Hosts
    store: SnapshotStore
    models: Models
    images: ImageFormat
    clock: Clock
    settings: HostSettings
    facts: Mapping[str, str]
    directory: Path
    threads: int
    deadlines: Deadlines = field(default_factory=Deadlines)
    # None on a node without GPUs.
    cuda: Cuda | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_facts: Mapping[str, str] = field(default_factory=dict)

    def facts_of(self, device: str) -> dict[str, str]:
        """What a process on ``device`` is bound to here."""
        return {**self.facts, **(self.gpu_facts if uses_cuda(device) else {})}

    def instance_directory(self, instance: str) -> Path:
        return self.directory / "instances" / instance


def uses_cuda(device: str) -> bool:
    return device.startswith("cuda")


class Subject(Protocol):
    """The instance that a job works on."""

    instance: Instance
    host: Host | None
    load_parts: tuple[Phase, ...]


def start(node: Node, subject: Subject, model: Model) -> list[Step]:
    """Load a model in a new process."""
    instance = subject.instance
    found = model

    async def fetch() -> None:
        nonlocal found
        found = await node.models.fetch(model)

    async def launch() -> None:
        subject.host = await node.hosts.take()
        await subject.host.launch(
            instance.id,
            node.instance_directory(instance.id),
            node.settings.command,
            node.settings.environment,
        )
        subject.instance = replace(subject.instance, pid=subject.host.pid)

    async def load() -> None:
        # The digest is read beside the load: both want the same file in the page cache.
        digest = asyncio.create_task(node.models.weights_digest(found))
        try:
            loaded = await _host(subject).call(
                "load",
                node.deadlines.load,
                model_dir=str(found.directory),
                engine=found.engine,
                device=node.settings.device,
                max_queue=node.settings.max_queue,
                max_new_tokens_limit=node.settings.max_new_tokens,
            )
        except BaseException:
            digest.cancel()
            raise
        subject.instance = replace(
            subject.instance,
            engine=loaded["engine"],
            device=loaded["device"],
            canary=_canary(loaded["canary"]),
            versions=loaded["versions"],
            weights_digest=await digest,
        )
        subject.load_parts = tuple(Phase(f"load.{name}", seconds) for name, seconds in loaded["phases"])

    async def serve() -> None:
        await _serve(node, subject)

    return [
        Step("fetch", fetch),
        Step("directory", lambda: _make_directory(node, instance), lambda: _remove_directory(node, instance)),
        Step("launch", launch, lambda: _release(subject)),
        Step("load", load),
        Step("serve", serve),
    ]


def restore(node: Node, subject: Subject, snapshot: Snapshot, fetch: Action | None = None) -> list[Step]:
    """Make an instance from a snapshot.

    Args:
        fetch: brings the snapshot to this node; None: it is here.
    """
    instance = subject.instance
    manifest = snapshot.manifest

    async def check_facts() -> None:
        if snapshot.quarantine_reason:
            raise FailedPrecondition(
                "SNAPSHOT_QUARANTINED",
                f"snapshots/{manifest.id} is quarantined: {snapshot.quarantine_reason}",
                metadata={"snapshot": manifest.id},
            )
        model = await node.models.resolve(manifest.model, manifest.engine)
        digest = await node.models.weights_digest(model)
        here = {**node.facts_of(manifest.device), "weights": digest}
        compatibility.check(manifest.id, manifest.compatibility, here)

    async def verify() -> None:
        try:
            await node.store.verify(snapshot)
        except DataLoss as error:
            await node.store.quarantine(manifest.id, error.message)
            raise

    async def bring_back() -> None:
        subject.host = await node.hosts.take()
        await subject.host.restore(
            instance.id,
            node.instance_directory(instance.id),
            node.store.images(snapshot),
            manifest.mounts,
            manifest.pipes,
            node.deadlines.restore,
        )
        subject.instance = replace(
            subject.instance,
            pid=subject.host.pid,
            device=manifest.device,
            canary=manifest.canary,
            versions=manifest.compatibility,
            weights_digest=manifest.compatibility["weights"],
        )

    async def revive() -> None:
        uuids = [gpu.uuid for gpu in node.gpus]
        await tree.revive(_cuda(node), [_host(subject).pid], tree.device_map(manifest.gpus, uuids))

    async def wake() -> None:
        await _wake(node, subject)

    async def canary() -> None:
        answer = _canary(await _host(subject).call("canary", node.deadlines.canary))
        if not manifest.canary.agrees(answer):
            reason = f"its canary answered {answer.tokens[:8]}…, not {manifest.canary.tokens[:8]}…"
            await node.store.quarantine(manifest.id, reason)
            raise DataLoss(
                "CANARY_MISMATCH",
                f"snapshots/{manifest.id} came back answering wrongly and is quarantined: {reason}",
                metadata={"snapshot": manifest.id},
            )

    async def serve() -> None:
        await _serve(node, subject)

    return [
        Step("check", check_facts),
        *([Step("fetch", fetch)] if fetch else []),
        Step("verify", verify),
        Step("directory", lambda: _make_directory(node, instance), lambda: _remove_directory(node, instance)),
        Step("criu", bring_back, lambda: _release(subject)),
        *([Step("cuda_restore", revive)] if uses_cuda(manifest.device) else []),
        Step("wake", wake),
        Step("canary", canary),
        Step("serve", serve),
    ]


@dataclass
class Capture:
    """A capture under way, and what its steps find out for each other."""

    node: Node
    subject: Subject
    snapshot: str
    staged: Path | None = None
    layout: Json = field(default_factory=dict)
    asleep: bool = False
    suspended: bool = False
    paused_at: float = 0.0
    pause_seconds: float = 0.0
    # Filled by the executor as the steps end; the manifest records those before its own.
    phases: list[Phase] = field(default_factory=list)
    result: Snapshot | None = None

    def steps(self) -> list[Step]:
        cuda = uses_cuda(self.subject.instance.device)
        return [
            Step("stage", self.stage, self.discard),
            Step("drain", self.drain, self.accept),
            Step("quiesce", self.quiesce, self.rouse),
            *([Step("cuda_checkpoint", self.suspend, self.revive)] if cuda else []),
            Step("dump", self.dump),
            *([Step("cuda_restore", self.revive)] if cuda else []),
            Step("wake", self.wake),
            Step("compact", self.compact),
            Step("verify", self.verify),
            Step("commit", self.commit, self.retract),
        ]

    async def stage(self) -> None:
        self.staged = await self.node.store.stage(self.snapshot)

    async def discard(self) -> None:
        # What another capture of the same id staged is not ours to remove.
        if self.staged is not None:
            await self.node.store.discard(self.snapshot)

    async def drain(self) -> None:
        host = _host(self.subject)
        status = await host.call("status", self.node.deadlines.serve)
        if status["served"]:
            raise FailedPrecondition(
                "INSTANCE_SERVED",
                f"a caller's prompt has entered instances/{self.subject.instance.id}; "
                "capture one that has served nobody",
                metadata={"instance": self.subject.instance.id},
            )
        self.paused_at = self.node.clock.monotonic()
        await host.call("drain", self.node.deadlines.drain * 2, deadline_seconds=self.node.deadlines.drain)
        # A prompt may have slipped in while it drained.
        if (await host.call("status", self.node.deadlines.serve))["served"]:
            raise Aborted("INSTANCE_SERVED", "a caller's prompt entered the instance while it drained")

    async def accept(self) -> None:
        if self.paused_at and not self.asleep:
            await _unless_lost(self.subject, self._accept)

    async def _accept(self) -> None:
        status = await _host(self.subject).call("status", self.node.deadlines.serve)
        if status["draining"]:
            await _host(self.subject).call("accept", self.node.deadlines.serve)

    async def quiesce(self) -> None:
        await _host(self.subject).call("quiesce", self.node.deadlines.quiesce)
        self.asleep = True

    async def rouse(self) -> None:
        if self.asleep:
            await _unless_lost(self.subject, self.wake)

    async def suspend(self) -> None:
        await tree.suspend(_cuda(self.node), [_host(self.subject).pid], self.node.deadlines.cuda_lock)
        self.suspended = True

    async def revive(self) -> None:
        if self.suspended:
            await _unless_lost(self.subject, lambda: _rouse_cuda(self.node, self.subject))
            self.suspended = False

    async def dump(self) -> None:
        self.layout = await _host(self.subject).dump(self._staged(), self.node.deadlines.dump)

    async def wake(self) -> None:
        await _wake(self.node, self.subject)
        await _serve(self.node, self.subject)
        self.asleep = False
        self.pause_seconds = self.node.clock.monotonic() - self.paused_at

    async def compact(self) -> None:
        await asyncio.to_thread(compact, self.node.images, self._staged(), self.node.threads)

    async def verify(self) -> None:
        await asyncio.to_thread(check, self.node.images, self._staged())

    async def commit(self) -> None:
        instance = self.subject.instance
        if instance.canary is None:
            raise Internal("NO_CANARY", f"instances/{instance.id} recorded no canary when it was loaded")
        self.result = await self.node.store.commit(
            Manifest(
                id=self.snapshot,
                deployment=instance.deployment,
                model=instance.model,
                engine=instance.engine,
                device=instance.device,
                create_time=self.node.clock.now(),
                source_pause_seconds=self.pause_seconds,
                phases=tuple(self.phases),
                canary=instance.canary,
                compatibility={
                    **self.node.facts_of(instance.device),
                    **instance.versions,
                    "weights": instance.weights_digest,
                },
                mounts=tuple(self.layout["mounts"]),
                pipes=self.layout["pipes"],
                files=tuple(await self.node.store.digest(self.snapshot)),
                gpus=tuple(gpu.uuid for gpu in self.node.gpus) if uses_cuda(instance.device) else (),
            )
        )

    def _staged(self) -> Path:
        if self.staged is None:
            raise Internal("NOT_STAGED", f"snapshots/{self.snapshot} has no directory yet")
        return self.staged

    async def retract(self) -> None:
        if self.result is not None:
            await self.node.store.delete(self.snapshot)


def park(node: Node, subject: Subject) -> list[Step]:
    """Answer what is running, then give up the GPU or, without one, the CPU."""

    async def drain() -> None:
        await _host(subject).call("drain", node.deadlines.drain * 2, deadline_seconds=node.deadlines.drain)

    async def accept() -> None:
        await _unless_lost(subject, lambda: _accept(node, subject))

    async def freeze() -> None:
        await _host(subject).freeze()

    async def thaw() -> None:
        await _unless_lost(subject, _host(subject).thaw)

    async def suspend() -> None:
        await tree.suspend(_cuda(node), [_host(subject).pid], node.deadlines.cuda_lock)

    async def rouse() -> None:
        await _unless_lost(subject, lambda: _rouse_cuda(node, subject))

    if uses_cuda(subject.instance.device):
        return [Step("drain", drain, accept), Step("cuda_checkpoint", suspend, rouse)]
    return [Step("drain", drain, accept), Step("freeze", freeze, thaw)]


def resume(node: Node, subject: Subject) -> list[Step]:
    """Let a parked instance run and answer again."""

    async def thaw() -> None:
        await _host(subject).thaw()

    async def revive() -> None:
        await tree.revive(_cuda(node), [_host(subject).pid], {})

    async def accept() -> None:
        await _accept(node, subject)

    if uses_cuda(subject.instance.device):
        return [Step("cuda_restore", revive), Step("accept", accept)]
    return [Step("thaw", thaw), Step("accept", accept)]


def stop(node: Node, subject: Subject) -> list[Step]:
    """End an instance and remove what it left."""
    return [
        Step("release", lambda: _release(subject)),
        Step("directory", lambda: _remove_directory(node, subject.instance)),
    ]


def _host(subject: Subject) -> Host:
    if subject.host is None:
        raise Internal("NO_HOST", f"instances/{subject.instance.id} has no process")
    return subject.host


async def serve_host(node: Node, instance: str, host: Host) -> None:
    """Open its socket."""
    await host.call("serve", node.deadlines.serve, socket=SOCKET, instance=instance)


async def wake_host(node: Node, instance: str, host: Host) -> None:
    """End its quiescence; it has a new identity then and draws other random numbers than its twins."""
    await host.call("wake", node.deadlines.wake, instance=instance, entropy=secrets.token_hex(32))


def _cuda(node: Node) -> Cuda:
    if node.cuda is None:
        raise FailedPrecondition("NO_GPU", "this node has no CUDA driver, and the process needs one")
    return node.cuda


async def _rouse_cuda(node: Node, subject: Subject) -> None:
    await tree.rouse(_cuda(node), [_host(subject).pid])


async def settle_cuda(node: Node, instance: Instance, host: Host) -> bool:
    """After a crash of the daemon: True when the process is parked; else its CUDA runs again."""
    cuda = _cuda(node)
    if instance.state is State.PARKED and await cuda.state(host.pid) == "checkpointed":
        return True
    await tree.rouse(cuda, [host.pid])
    return False


async def _serve(node: Node, subject: Subject) -> None:
    await serve_host(node, subject.instance.id, _host(subject))


async def _wake(node: Node, subject: Subject) -> None:
    await wake_host(node, subject.instance.id, _host(subject))


async def _accept(node: Node, subject: Subject) -> None:
    await _host(subject).call("accept", node.deadlines.serve)


async def _unless_lost(subject: Subject, action: Action) -> None:
    """Bring a source back to serving or, where that fails, end it: it must not stay in between."""
    try:
        await action()
    except DumontError as error:
        log.error("instance could not be brought back", instance=subject.instance.id, reason=error.reason)
        await _release(subject)


async def _release(subject: Subject) -> None:
    host, subject.host = subject.host, None
    if host is not None:
        await host.release()


async def _make_directory(node: Node, instance: Instance) -> None:
    node.instance_directory(instance.id).mkdir(mode=0o700)


async def _remove_directory(node: Node, instance: Instance) -> None:
    await asyncio.to_thread(shutil.rmtree, node.instance_directory(instance.id), ignore_errors=True)


def _canary(answer: Json) -> Canary:
    return Canary(tuple(answer["tokens"]), float(answer["logprob"]))

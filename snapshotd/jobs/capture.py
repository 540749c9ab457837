"""Capture: make a snapshot of an instance, which serves on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dumont.aio import thread_to_completion
from dumont.errors import DumontError, FailedPrecondition, Internal, NotFound, ResourceExhausted
from snapshotd.images.compact import check, compact
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node, Subject, uses_cuda
from snapshotd.jobs.executor import Step
from snapshotd.model import Json, Manifest, Phase, Snapshot

# Bytes free of a disk on which nothing more can be written.
FULL = 1 << 20
# What a CUDA context holds besides weights, which leave the GPU before.
CUDA_CONTEXT = 512 << 20


@dataclass
class Capture:
    """A capture under way, and what its steps find out for each other."""

    node: Node
    subject: Subject
    snapshot: str
    staged: Path | None = None
    layout: Json = field(default_factory=dict)
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
            Step("prepare", self.prepare, self.abandon),
            Step("drain", self.drain, self.ensure_serving),
            Step("quiesce", self.quiesce),
            *(
                [Step("cuda_checkpoint", self.suspend, self.resume_cuda), Step("trim", self.trim)]
                if cuda
                else []
            ),
            Step("dump", self.dump),
            *([Step("cuda_restore", self.recover_cuda)] if cuda else []),
            Step("wake", self.wake),
            Step("compact", self.compact),
            Step("verify", self.verify),
            Step("commit", self.commit, self.retract),
        ]

    async def stage(self) -> None:
        await self._refuse_damaged_origin()
        self.staged = await self.node.store.stage(self.snapshot)
        # Before anything stands still: a disk that fills up halfway would take the rest of the node along.
        needed = await self._estimate()
        self.node.disk.reserve(self.subject.instance.id, self.staged, needed)

    async def discard(self) -> None:
        # What another capture of the same id staged is not ours to remove.
        if self.staged is not None:
            await self.node.store.discard(self.snapshot)

    async def prepare(self) -> None:
        """Before the pause: whatever a dump needs besides the process, room for its memory above all."""
        await self._refuse_served()
        with self._disk_may_fill():
            await actions.host_of(self.subject).prepare(self._staged(), self.node.deadlines.dump)

    async def abandon(self) -> None:
        # A host that is gone took it along.
        with contextlib.suppress(DumontError):
            await actions.host_of(self.subject).abandon()

    async def drain(self) -> None:
        await self._refuse_served()
        self.paused_at = self.node.clock.monotonic()
        await actions.drain(self.node, self.subject)

    async def ensure_serving(self) -> None:
        await actions.ensure_serving(self.node, self.subject)

    async def quiesce(self) -> None:
        actions.record_gpu_memory(self.node, self.subject)
        actions.reserve_gpu_memory(self.node, self.subject)
        await actions.quiesce(self.node, self.subject)
        # Its socket is closed now: a prompt that came, and was refused, while it drained is in its memory.
        await self._refuse_served()

    async def _estimate(self) -> int:
        """Bytes that the image may take: what the process has written, on a GPU too, and what it maps."""
        instance = self.subject.instance
        processes = self.node.process_tree(actions.host_of(self.subject).pid)
        written = sum(map(self.node.anonymous_memory, processes))
        if uses_cuda(instance.device):
            written += CUDA_CONTEXT
        if not instance.snapshot:
            return written
        # A restored one maps most of its memory from there, and the new image takes that over.
        with contextlib.suppress(NotFound):
            origin = await self.node.store.get(instance.snapshot)
            written += sum(file.size for file in origin.manifest.files)
        return written

    async def _refuse_damaged_origin(self) -> None:
        """What it was restored from becomes part of the new snapshot."""
        if not self.subject.instance.snapshot:
            return
        with contextlib.suppress(NotFound):  # the shim refuses what is gone
            origin = await self.node.store.get(self.subject.instance.snapshot)
            if origin.quarantine_reason:
                raise FailedPrecondition(
                    "ORIGIN_QUARANTINED",
                    f"instances/{self.subject.instance.id} was restored from snapshots/{origin.manifest.id}, "
                    f"which is quarantined: {origin.quarantine_reason}; capture another instance",
                    metadata={"snapshot": origin.manifest.id},
                )

    async def _refuse_served(self) -> None:
        status = await actions.host_of(self.subject).call("status", self.node.deadlines.serve)
        if status["served"]:
            raise FailedPrecondition(
                "INSTANCE_SERVED",
                f"a caller's prompt has entered instances/{self.subject.instance.id}; "
                "capture one that has served nobody",
                metadata={"instance": self.subject.instance.id},
            )

    async def suspend(self) -> None:
        # First: what is half done is undone as well.
        self.suspended = True
        await actions.suspend_cuda(self.node, self.subject)

    async def recover_cuda(self) -> None:
        await actions.recover_cuda(self.node, self.subject)
        self.suspended = False

    async def trim(self) -> None:
        await actions.trim(self.node, self.subject)

    async def resume_cuda(self) -> None:
        if self.suspended:
            await actions.or_release(self.subject, lambda: actions.recover_cuda(self.node, self.subject))
            self.suspended = False

    async def dump(self) -> None:
        with self._disk_may_fill():
            self.layout = await actions.host_of(self.subject).dump(self._staged(), self.node.deadlines.dump)

    async def wake(self) -> None:
        await actions.wake(self.node, self.subject)
        await actions.serve(self.node, self.subject)
        self.pause_seconds = self.node.clock.monotonic() - self.paused_at

    async def compact(self) -> None:
        origin = Path(self.layout["origin"]) if self.layout.get("origin") else None
        await thread_to_completion(
            partial(compact, self.node.images, self._staged(), origin, self.node.threads)
        )

    async def verify(self) -> None:
        await thread_to_completion(partial(check, self.node.images, self._staged()))

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
                gpu_bytes=instance.gpu_bytes,
                weights=instance.weights,
                weight_files=instance.weight_files,
                model_files=instance.model_files,
                gpus=tuple(self.node.gpu_uuids()) if uses_cuda(instance.device) else (),
                gpu=instance.gpu,
            )
        )

    def _staged(self) -> Path:
        if self.staged is None:
            raise Internal("NOT_STAGED", f"snapshots/{self.snapshot} has no directory yet")
        return self.staged

    @contextlib.contextmanager
    def _disk_may_fill(self) -> Iterator[None]:
        """CRIU and the page server do not say it in a way that could be relied on."""
        staged = self._staged()
        try:
            yield
        except DumontError as error:
            if _is_full(staged):
                raise ResourceExhausted(
                    "DISK_FULL",
                    f"{staged.parent} filled up during the capture; delete snapshots or give it more room",
                    metadata={"snapshot": self.snapshot},
                ) from error
            raise

    async def retract(self) -> None:
        if self.result is not None:
            await self.node.store.delete(self.snapshot)


def _is_full(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < FULL
    return False

"""Capture: make a snapshot of an instance, which then goes on serving."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dumont.aio import thread_to_completion
from dumont.errors import DumontError, FailedPrecondition, Internal, NotFound, ResourceExhausted
from snapshotd.images.compact import check, compact
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node, Subject, uses_cuda
from snapshotd.jobs.executor import Step
from snapshotd.model import Json, Manifest, Phase, Snapshot, Weights

# A disk with fewer free bytes is full.
FULL = 1 << 20
# What a CUDA context holds besides weights, which leave the GPU before.
CUDA_CONTEXT = 512 << 20


@dataclass
class Capture:
    """A capture under way, and what its steps learn for each other.

    Attributes:
        layout: what the dump answered.
        suspended: whether CUDA was, or may have been, suspended.
        phases: the executor appends each step's as it ends. The manifest records those before ``commit``.
    """

    node: Node
    subject: Subject
    snapshot: str
    staged: Path | None = None
    layout: Json = field(default_factory=dict)
    suspended: bool = False
    paused_at: float = 0.0
    pause_seconds: float = 0.0
    phases: list[Phase] = field(default_factory=list)
    result: Snapshot | None = None

    def steps(self) -> list[Step]:
        """The steps, in order."""
        cuda = uses_cuda(self.subject.instance.device)
        return [
            Step("stage", self.stage, self.discard),
            Step("prepare", self.prepare, self.abandon),
            Step("drain", self.drain, self.ensure_serving),
            Step("quiesce", self.quiesce),
            *(
                [Step("cuda_checkpoint", self.suspend, self.undo_suspend), Step("trim", self.trim)]
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
        """Make the snapshot's directory."""
        await self._refuse_damaged_origin()
        self.staged = await self.node.store.stage(self.snapshot)
        # Before anything stands still: a disk that fills up halfway would take the rest of the node along.
        needed = await self._estimate()
        self.node.disk.reserve(self.subject.instance.id, self.staged, needed)

    async def discard(self) -> None:
        """Remove the snapshot's directory."""
        # A directory that another capture of the same id has staged must stay.
        if self.staged is not None:
            await self.node.store.discard(self.snapshot)

    async def prepare(self) -> None:
        """Prepare, before the pause, everything that a dump needs, above all space for the memory."""
        await self._refuse_served()
        with self._disk_may_fill():
            await actions.host_of(self.subject).prepare(self._staged(), self.node.deadlines.dump)

    async def abandon(self) -> None:
        """Undo :meth:`prepare`."""
        # If the host is gone, so is what it had prepared.
        with contextlib.suppress(DumontError):
            await actions.host_of(self.subject).abandon()

    async def drain(self) -> None:
        """Answer the running requests and refuse new ones. The pause begins."""
        await self._refuse_served()
        self.paused_at = self.node.clock.monotonic()
        await actions.drain(self.node, self.subject)

    async def ensure_serving(self) -> None:
        """Undo the drain and what follows it: the source serves again, or is ended."""
        await actions.ensure_serving(self.node, self.subject)

    async def quiesce(self) -> None:
        """Close everything that an image cannot contain."""
        actions.record_gpu_memory(self.node, self.subject)
        actions.reserve_gpu_memory(self.node, self.subject)
        await actions.quiesce(self.node, self.subject)
        # Checked again, because its socket is closed only now: a prompt that arrived while it drained is in
        # its memory, although it was refused.
        await self._refuse_served()

    async def _estimate(self) -> int:
        """Bytes that the image may take: what the process has written, on a GPU too, and what it maps."""
        instance = self.subject.instance
        processes = self.node.process_tree(actions.host_of(self.subject).pid)
        written = sum(map(self.node.anonymous_memory, processes))
        if uses_cuda(instance.device):
            written += self._leaving_gpu(processes)
        if not instance.snapshot:
            return written
        # A restored one maps most of its memory from there, and the new image takes that over.
        with contextlib.suppress(NotFound):
            origin = await self.node.store.get(instance.snapshot)
            written += sum(file.size for file in origin.manifest.files)
        return written

    def _leaving_gpu(self, processes: Sequence[int]) -> int:
        """Bytes that come from the GPU into host memory: of weights only those that the snapshot includes."""
        gpus = self.node.gpus
        if self.subject.instance.weights is Weights.DETACHED or gpus is None:
            return CUDA_CONTEXT
        return max(sum(gpus.status.used_by(processes).values()), CUDA_CONTEXT)

    async def _refuse_damaged_origin(self) -> None:
        """Refuse if the snapshot that the instance was restored from, and still maps, is damaged."""
        if not self.subject.instance.snapshot:
            return
        with contextlib.suppress(NotFound):  # the shim refuses the dump if the origin is gone
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
        """Copy GPU memory to host memory."""
        # Set first, so that a suspension that fails half-way is undone as well.
        self.suspended = True
        await actions.suspend_cuda(self.node, self.subject)

    async def recover_cuda(self) -> None:
        """Copy GPU memory back."""
        await actions.recover_cuda(self.node, self.subject)
        self.suspended = False

    async def trim(self) -> None:
        """Drop the zeros among the memory that came from the GPU."""
        await actions.trim(self.node, self.subject)

    async def undo_suspend(self) -> None:
        """Undo the suspension, unless it was undone already; a source that does not recover is ended."""
        if self.suspended:
            await actions.run_or_end(self.subject, lambda: actions.recover_cuda(self.node, self.subject))
            self.suspended = False

    async def dump(self) -> None:
        """Have CRIU write the image."""
        with self._disk_may_fill():
            self.layout = await actions.host_of(self.subject).dump(self._staged(), self.node.deadlines.dump)

    async def wake(self) -> None:
        """Let the source serve again. The pause ends."""
        await actions.wake(self.node, self.subject)
        await actions.serve(self.node, self.subject)
        self.pause_seconds = self.node.clock.monotonic() - self.paused_at

    async def compact(self) -> None:
        """Rewrite the image so that a restore maps most of it."""
        origin = Path(self.layout["origin"]) if self.layout.get("origin") else None
        await thread_to_completion(
            partial(compact, self.node.images, self._staged(), origin, self.node.threads)
        )

    async def verify(self) -> None:
        """Check that the image is complete."""
        await thread_to_completion(partial(check, self.node.images, self._staged()))

    async def commit(self) -> None:
        """Digest the image files and write the manifest, with which the snapshot exists."""
        instance = self.subject.instance
        if instance.canary is None:
            raise Internal("NO_CANARY", f"instances/{instance.id} recorded no canary when it was loaded")
        self.result = await self.node.store.commit(
            Manifest(
                id=self.snapshot,
                deployment=instance.deployment,
                model=instance.model,
                engine=instance.engine,
                engine_options=instance.engine_options,
                device=instance.device,
                create_time=self.node.clock.now(),
                source_pause_seconds=self.pause_seconds,
                phases=tuple(self.phases),
                canary=instance.canary,
                compatibility={
                    **self.node.facts_of(instance.device, instance.engine),
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
        """Report a failure on a full disk as DISK_FULL: CRIU and the page server do not reliably say so."""
        staged = self._staged()
        try:
            yield
        except DumontError as error:
            # By now CRIU may have removed what it wrote, and its log may have found no room for the reason.
            short = self.node.disk.is_short(self.subject.instance.id, staged)
            if short or _is_full(staged) or os.strerror(errno.ENOSPC) in error.message:
                raise ResourceExhausted(
                    "DISK_FULL",
                    f"{staged.parent} filled up during the capture; delete snapshots or give it more room",
                    metadata={"snapshot": self.snapshot},
                ) from error
            raise

    async def retract(self) -> None:
        """Delete the snapshot again."""
        if self.result is not None:
            await self.node.store.delete(self.snapshot)


def _is_full(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < FULL
    return False

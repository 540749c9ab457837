"""What the jobs need of the world."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from snapshotd.model import CacheEntry, ImageFile, Json, Manifest, MappedFile, Model, Sharing, Snapshot


class Clock(Protocol):
    """Time, so that tests can move it."""

    def now(self) -> datetime:
        """The time of day, in UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that only ever go forward."""
        ...


class Host(Protocol):
    """A model host and the shim that holds it.

    It begins empty. ``launch`` or ``restore`` gives it a process; ``release`` ends both and leaves
    nothing. Between them ``call`` reaches the model host's life cycle (load, serve, drain, quiesce,
    wake, canary), ``dump``, once prepared, writes its image while it waits in quiescence, and
    ``freeze`` stops it from running. Every method raises ``DumontError``: the model host's own refusal
    with its reason, ``HOST_TIMEOUT`` when it gives no answer, ``HOST_LOST`` when its process or shim is
    gone. ``end`` is how the process ended by itself, in words; empty while it runs or where nobody saw it.
    """

    instance: str
    pid: int
    lost: asyncio.Event
    end: str

    async def launch(
        self, instance: str, directory: Path, command: Sequence[str], environment: Mapping[str, str]
    ) -> None: ...

    async def restore(
        self,
        instance: str,
        directory: Path,
        images: Path,
        origin: Path,
        mounts: Sequence[str],
        pipes: Mapping[str, int],
        timeout: float,
    ) -> None:
        """
        Args:
            images: what CRIU reads.
            origin: the snapshot's own directory, where memory is mapped from.
            mounts: external mounts, by mount point; this node must have each.
        """
        ...

    async def prepare(self, images: Path, timeout: float) -> None:
        """Make ready for one dump into the directory ``images``, which the model host need not wait for."""
        ...

    async def abandon(self) -> None:
        """Undo ``prepare``, if there was no dump since."""
        ...

    async def dump(self, images: Path, timeout: float) -> Json:
        """Write the image.

        Answers the ``mounts`` and ``pipes`` that a restore must be told, and the ``origin``: the directory
        of the images that it was restored from itself, empty if it was started.
        """
        ...

    async def call(self, command: str, timeout: float, **arguments: object) -> Json: ...

    async def freeze(self) -> None: ...

    async def thaw(self) -> None: ...

    async def status(self) -> Json:
        """The shim's own view: instance, pid, frozen, exit_status."""
        ...

    async def release(self) -> None: ...


class Hosts(Protocol):
    """The node's shims. One spare is kept started, because starting one takes longer than a restore may."""

    async def take(self) -> Host:
        """An empty host, ready at once if the spare is."""
        ...

    async def find(self) -> Sequence[Host]:
        """The hosts that an earlier daemon left running, the empty ones released."""
        ...

    async def end_orphans(self, instances: Path) -> None:
        """End the model hosts that no shim holds any more: a frozen one would stay for ever.

        Args:
            instances: the directory that holds a directory for each instance.
        """
        ...

    def mounts(self) -> set[str]:
        """The mount points that a host has on this node, its own among them."""
        ...

    async def close(self) -> None:
        """Let go of all hosts without ending them; the spare ends."""
        ...


class Cuda(Protocol):
    """The CUDA state of processes, driven from outside them.

    A process is ``running``, ``locked`` (its CUDA calls wait), ``checkpointed`` (its GPU memory is in host
    memory and the GPU is free) or ``failed``. Lock, checkpoint, restore, unlock go through them in that
    order. Every method raises ``DumontError``: ``CUDA_FAILED`` when the driver refuses, ``GPU_MEMORY`` when
    a GPU is too full, ``CUDA_TIMEOUT`` for what does not end, ``CUDA_AGENT_LOST`` when whoever performs the
    operation ends in the middle of it. After the last two only ``state`` says what became of the process.
    """

    async def state(self, pid: int) -> str:
        """``CUDA_FAILED`` also when the process does not use CUDA."""
        ...

    async def lock(self, pid: int, timeout: float) -> None:
        """``timeout`` in seconds: work that is still on the GPU after that is ``CUDA_LOCK_TIMEOUT``."""
        ...

    async def checkpoint(self, pid: int) -> None: ...

    async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
        """``devices``: UUIDs, old to new, of every GPU of the node; empty: the same GPUs."""
        ...

    async def unlock(self, pid: int) -> None: ...


class WeightLoader(Protocol):
    """Brings weights from the node's cache to a GPU, beside whatever the model host does meanwhile."""

    async def ready(self) -> bool:
        """Whether it can be asked; one that died is started again, for the next."""
        ...


class GpuStatus(Protocol):
    """This node's GPUs as they are now; memory in bytes, GPUs by UUID."""

    def used_by(self, pids: Collection[int]) -> Mapping[str, int]:
        """What processes hold, of each GPU that they are on."""
        ...

    def free(self, gpu: str) -> int:
        """What nobody holds of one GPU."""
        ...

    def sharing(self) -> Sequence[Sharing]:
        """How GPUs are shared in ways that CUDA processes cannot be suspended in; empty: they can."""
        ...


class SnapshotStore(Protocol):
    """Snapshots of this node.

    ``stage`` gives a directory that no list shows. ``commit`` makes its files durable, then the
    manifest, and only with that does the snapshot exist. A snapshot is never changed afterwards,
    only quarantined or deleted.
    """

    async def stage(self, snapshot: str) -> Path: ...

    async def discard(self, snapshot: str) -> None:
        """Remove a staged directory, if there is one."""
        ...

    async def digest(self, snapshot: str) -> list[ImageFile]:
        """Name, size and digest of every image file that is staged."""
        ...

    async def commit(self, manifest: Manifest, fetched_from: str = "") -> Snapshot:
        """Make what is staged a snapshot.

        Args:
            fetched_from: the key that signed it in the object store: it was verified on its way here and can
                be fetched again, so it need not survive the machine. Empty: it was captured here.
        """
        ...

    async def get(self, snapshot: str) -> Snapshot: ...

    async def verify(self, snapshot: Snapshot, again: bool = False) -> None:
        """Compare every file; raises ``DataLoss`` naming the file that differs.

        Args:
            again: read also what nobody has written to since it was last read and found right.
        """
        ...

    def pin(self, owner: str, snapshot: str) -> None:
        """From now on the image files of a snapshot, once they are there, stay for ``owner``.

        Args:
            owner: an instance that restores or maps them, or whoever else reads them; it keeps one at a time.
        """
        ...

    async def images(self, snapshot: Snapshot) -> Path:
        """The directory with its image files, for as long as somebody keeps it; brought there if need be.

        Raises:
            DataLoss: they cannot be brought there, because what is stored of them is damaged.
            FailedPrecondition: KEY_MISSING, they are encrypted with another key than this node's.
            ResourceExhausted: there is no room for them.
        """
        ...

    async def unpin(self, owner: str) -> None:
        """``owner`` reads and maps nothing any more; nothing happens if it kept nothing."""
        ...

    async def quarantine(self, snapshot: str, reason: str) -> None: ...

    async def note_published(self, snapshot: str) -> None:
        """Remember that it is in the object store."""
        ...

    async def touch(self, snapshot: str) -> None:
        """It is in use now."""
        ...

    async def entries(self) -> Sequence[CacheEntry]:
        """What each snapshot takes."""
        ...

    async def delete(self, snapshot: str) -> None: ...

    async def list(self) -> list[Snapshot]: ...


class Models(Protocol):
    """Models that this node can load."""

    async def resolve(self, name: str, engine: str = "") -> Model:
        """Find a model and check that it can be loaded; ``directory`` is None if it must be fetched."""
        ...

    async def find(self, name: str, engine: str = "") -> Model | None:
        """The model as it is on this node, checked likewise; None: it is not here."""
        ...

    async def digests(self, model: Model) -> Mapping[str, str]:
        """BLAKE3 of each file that a model host reads besides weights, by its path in the directory."""
        ...

    async def fetch(self, model: Model) -> Model:
        """Download what is missing; the result has a directory."""
        ...


class WeightFiles(Protocol):
    """The weight files of models on this node, and the memory that it keeps them in for its instances.

    What an instance holds stays there until it is released, whatever else comes.
    """

    async def digest(self, model: Model) -> str:
        """BLAKE3 over the names and bytes of the weight files; read again only when a file changed."""
        ...

    async def mapped(self, model: Model) -> tuple[MappedFile, ...]:
        """The weight files as the file system knows them now, for whoever is about to map them."""
        ...

    async def overwritten(self, files: Sequence[MappedFile]) -> str:
        """The path of one that was written to since: whoever maps it sees other weights now. Empty: none was;
        one that was replaced by another file is mapped as it was.
        """
        ...

    async def pin(self, instance: str, model: Model) -> Mapping[str, str]:
        """Bring all of them into memory, unless they are there, and keep them there for ``instance``.

        Returns:
            The digest of each file by its name; empty: they do not fit, or this node keeps none in memory.
        """
        ...

    def repin(self, instance: str, files: Mapping[str, str]) -> None:
        """Hold again what ``instance`` held when an earlier daemon ran."""
        ...

    def unpin(self, instance: str) -> None:
        """``instance`` uses nothing any more, or does not exist."""
        ...

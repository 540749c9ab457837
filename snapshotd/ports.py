"""The ports of snapshotd: what its core requires of the world. The adapters implement them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from dumont.errors import DumontError
from snapshotd.model import (
    CacheEntry,
    ImageFile,
    Json,
    Manifest,
    MappedFile,
    Model,
    Sharing,
    Snapshot,
    Unservable,
)


class Clock(Protocol):
    """The time, which tests can set."""

    def now(self) -> datetime:
        """The time of day, in UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds of a clock that never goes back."""
        ...


class Host(Protocol):
    """A model host and the shim that holds it.

    A host is empty at first. ``launch`` or ``restore`` gives it a process, and ``release`` ends process and
    shim. In between, ``call`` sends commands to the model host (load, serve, drain, quiesce, wake, canary),
    ``dump`` writes the image of a quiescent process, and ``freeze`` stops the process from running.

    Every method raises ``DumontError``: the model host's own refusal with its reason, ``HOST_TIMEOUT`` if it
    gives no answer, or ``HOST_LOST`` if its process or its shim has ended.

    Attributes:
        instance: the instance that it holds; empty for an empty host.
        pid: of the process, as the node sees it; 0 for an empty host.
        lost: set when the process or the shim ends.
        end: how the process ended by itself, in words; empty while it runs or if that is not known.
    """

    instance: str
    pid: int
    lost: asyncio.Event
    end: str
    # Of the errors that say so: HOST_LOST, or HOST_OUT_OF_MEMORY where the node's limit ended it.
    lost_reason: str

    async def launch(
        self,
        instance: str,
        directory: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        engine: str = "",
    ) -> None:
        """Start the model host.

        Args:
            directory: the instance's directory.
            command: program and arguments.
            environment: all of its variables.
            engine: whose environment it must see; empty: of none.
        """
        ...

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
        """Restore the process from an image.

        Args:
            directory: the instance's directory.
            images: the directory that CRIU reads.
            origin: the snapshot's own directory, from which memory is mapped.
            mounts: mount points of the external mounts; this node must have each of them.
            pipes: the inode of each pipe at capture, by role.
            timeout: seconds that CRIU may take.
        """
        ...

    async def prepare(self, images: Path, timeout: float) -> None:
        """Prepare a dump into the directory ``images`` while the model host still serves.

        Args:
            timeout: seconds that this may take.
        """
        ...

    async def abandon(self) -> None:
        """Undo ``prepare``, unless a dump has followed it."""
        ...

    async def dump(self, images: Path, timeout: float) -> Json:
        """Write the image of the process, which goes on.

        Returns:
            ``mounts`` and ``pipes`` as :meth:`restore` takes them, and ``origin``, the directory of the
            images from which the process itself was restored; empty if it was started.
        """
        ...

    async def call(self, command: str, timeout: float, **arguments: object) -> Json:
        """Send a command to the model host.

        Args:
            timeout: seconds to wait for the answer.
            arguments: fields of the command.
        """
        ...

    async def freeze(self) -> None:
        """Stop the process from running."""
        ...

    async def thaw(self) -> None:
        """Let a frozen process run again."""
        ...

    async def status(self) -> Json:
        """The state of the process as the shim sees it: instance, pid, frozen, exit_status."""
        ...

    async def release(self) -> None:
        """End the process and the shim. Nothing of them is left."""
        ...


class Hosts(Protocol):
    """The node's shims. A spare one is kept running, because starting one takes longer than a restore may."""

    async def take(self) -> Host:
        """An empty host: the spare one, if it is ready."""
        ...

    async def find(self) -> Sequence[Host]:
        """The hosts that an earlier daemon left running. Empty ones are released."""
        ...

    async def end_orphans(self, instances: Path) -> None:
        """End the model hosts whose shims have ended. A frozen one would otherwise stay for ever.

        Args:
            instances: the directory that holds a directory for each instance.
        """
        ...

    def mounts(self) -> set[str]:
        """The mount points that a model host has on this node, including those that its shim makes."""
        ...

    async def close(self) -> None:
        """Disconnect from all hosts, which go on; end the spare."""
        ...


class Cuda(Protocol):
    """The CUDA state of processes, driven from outside them.

    A process is ``running``, ``locked`` (its CUDA calls block), ``checkpointed`` (its GPU memory is in host
    memory and the GPU is free) or ``failed``. ``lock``, ``checkpoint``, ``restore`` and ``unlock`` lead
    through the first three and back.

    Every method raises ``DumontError``: ``CUDA_FAILED`` if the driver refuses, ``GPU_MEMORY`` if a GPU has
    too little memory, ``CUDA_TIMEOUT`` if the operation does not end, and ``CUDA_AGENT_LOST`` if the process
    that performs it ends meanwhile. After the last two, only ``state`` tells what became of the process.
    """

    async def state(self, pid: int) -> str:
        """The state of a process; raises ``CUDA_FAILED`` if the process does not use CUDA."""
        ...

    async def lock(self, pid: int, timeout: float) -> None:
        """Wait until the GPU is idle, and make further CUDA calls of the process block.

        Args:
            timeout: seconds after which work that is still on the GPU raises ``CUDA_LOCK_TIMEOUT``.
        """
        ...

    async def checkpoint(self, pid: int) -> None:
        """Copy the GPU memory of a locked process to host memory, and free the GPU."""
        ...

    async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
        """Copy the GPU memory of a checkpointed process back; the process is locked afterwards.

        Args:
            devices: old UUIDs to new ones, for every GPU of the node; empty for the same GPUs.
        """
        ...

    async def unlock(self, pid: int) -> None:
        """Let the CUDA calls of a locked process go on."""
        ...


class WeightLoader(Protocol):
    """Copies weights from the node's cache to a GPU while the model host does something else."""

    async def ready(self) -> bool:
        """Whether the loader takes orders. If it has died, this starts it again."""
        ...


class GpuStatus(Protocol):
    """The current state of this node's GPUs, with memory in bytes and GPUs by UUID."""

    def used_by(self, pids: Collection[int]) -> Mapping[str, int]:
        """The memory that the processes hold on each GPU that they use."""
        ...

    def free(self, gpu: str) -> int:
        """The memory of a GPU that nobody holds."""
        ...

    def sharing(self) -> Sequence[Sharing]:
        """The ways of sharing that keep CUDA processes from being suspended; empty if there are none."""
        ...


class SnapshotStore(Protocol):
    """The snapshots of this node.

    ``stage`` makes a directory that no list shows. ``commit`` makes its files durable and then writes the
    manifest, with which the snapshot exists. After that a snapshot is never changed, only quarantined or
    deleted.
    """

    async def stage(self, snapshot: str) -> Path:
        """Make the directory for a snapshot in the making.

        Raises:
            AlreadyExists: there is a snapshot of that id, complete or in the making.
        """
        ...

    async def discard(self, snapshot: str) -> None:
        """Remove the staged directory of a snapshot, if there is one."""
        ...

    async def digest(self, snapshot: str) -> list[ImageFile]:
        """The name, size and digest of every staged image file."""
        ...

    async def commit(self, manifest: Manifest, fetched_from: str = "") -> Snapshot:
        """Make the staged files a snapshot.

        Args:
            fetched_from: the key that signed the snapshot in the object store; empty if it was captured here.
                A fetched snapshot has been verified and can be fetched again, so it need not be durable.

        Raises:
            AlreadyExists: there is a snapshot of that id.
        """
        ...

    async def get(self, snapshot: str) -> Snapshot:
        """A snapshot by its id.

        Raises:
            NotFound: there is none.
            DataLoss: its manifest is damaged.
        """
        ...

    async def verify(self, snapshot: Snapshot, again: bool = False) -> None:
        """Compare every image file with the manifest.

        Args:
            again: also read files that were verified before and that nobody has written to since.

        Raises:
            DataLoss: a file differs, which is named.
        """
        ...

    def pin(self, owner: str, snapshot: str) -> None:
        """Keep the image files of a snapshot, once they are there, until ``owner`` unpins it.

        Args:
            owner: the instance that restores from the files or maps them, or another reader. It pins one
                snapshot at a time.
        """
        ...

    async def images(self, snapshot: Snapshot) -> Path:
        """The directory with the image files of a pinned snapshot. They are decrypted into it if need be.

        Raises:
            DataLoss: the stored snapshot is damaged and cannot be decrypted.
            FailedPrecondition: KEY_MISSING, it is encrypted with another key than this node's.
            ResourceExhausted: there is no room for the files.
        """
        ...

    async def unpin(self, owner: str) -> None:
        """Note that ``owner`` no longer uses image files. It need not have pinned any."""
        ...

    async def quarantine(self, snapshot: str, reason: str) -> None:
        """Remember why a snapshot must not be restored."""
        ...

    async def note_published(self, snapshot: str) -> None:
        """Remember that a snapshot is in the object store."""
        ...

    async def touch(self, snapshot: str) -> None:
        """Remember that a snapshot is used now."""
        ...

    async def entries(self) -> Sequence[CacheEntry]:
        """The size and last use of every snapshot."""
        ...

    async def delete(self, snapshot: str) -> None:
        """Remove a snapshot.

        Raises:
            NotFound: there is none.
        """
        ...

    async def list(self) -> list[Snapshot]:
        """Every snapshot whose manifest can be read, by id."""
        ...

    @property
    def unreadable(self) -> Mapping[str, DumontError]:
        """The snapshots that the last list left out, and why."""
        ...


class Models(Protocol):
    """Models that this node can load."""

    async def resolve(self, name: str, engine: str = "") -> Model:
        """Find a model and check that it can be loaded. Its ``directory`` is None if it must be fetched."""
        ...

    async def find(self, name: str, engine: str = "") -> Model | None:
        """Find a model on this node and check that it can be loaded; None if it is not here."""
        ...

    async def held(self) -> Sequence[Model | Unservable]:
        """The models that this node has, by name, and those that it cannot serve with the reason."""
        ...

    async def adapter(self, directory: str) -> Model:
        """A LoRA adapter in a directory of this node, and check that it can be loaded.

        Raises:
            FailedPrecondition: MODEL_INVALID, it is none, or its weights are not in safetensors.
        """
        ...

    async def digests(self, model: Model) -> Mapping[str, str]:
        """BLAKE3 of each file that a model host reads besides weights, by its path in the directory."""
        ...

    async def fetch(self, model: Model) -> Model:
        """Download what is missing of a model. The result has a directory."""
        ...


class WeightFiles(Protocol):
    """The weight files of the models on this node, and their copies in memory for the instances.

    Files that an instance has pinned stay in memory until it unpins them.
    """

    async def digest(self, model: Model) -> str:
        """BLAKE3 of the names and bytes of the weight files. Unchanged files are not read again."""
        ...

    async def mapped(self, model: Model) -> tuple[MappedFile, ...]:
        """The model's own weight files as they are now, before a process maps them."""
        ...

    async def overwritten(self, files: Sequence[MappedFile]) -> str:
        """The path of a mapped file that has been written to since, so that its weights have changed.

        Empty if there is none. A file that was replaced by another one is still mapped as it was.
        """
        ...

    async def pin(self, instance: str, model: Model) -> Mapping[str, str]:
        """Copy the weight files of a model into memory, unless they are there, and pin them for ``instance``.

        Returns:
            The digest of each file by its name; empty if they do not fit or this node has no weight cache.
        """
        ...

    def repin(self, instance: str, files: Mapping[str, str]) -> None:
        """Pin again the files that ``instance`` had pinned with an earlier daemon."""
        ...

    def unpin(self, instance: str) -> None:
        """Note that ``instance`` no longer uses weight files. It need not exist."""
        ...

"""The SnapshotStore port over encrypted snapshots; their image files are in memory while they are used.

``<root>/<id>/`` is an object store of one snapshot: its chunks, encrypted, and its manifest, signed by this
node. Beside them lie the marks of a plain directory, ``published``, ``quarantine`` and ``fetched``, the last
without the boot: everything here is durable. ``<root>/.staged-<id>/`` is one in the making, which the next
start of the daemon removes.

A capture is staged in ``unsealed``, a directory in memory, and leaves it when it is sealed. A snapshot that
somebody keeps is unsealed there, once for all of them, and is gone from there with the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from dumont.aio import thread_to_completion, to_completion
from dumont.errors import AlreadyExists, DumontError, NotFound, PermissionDenied, ResourceExhausted
from snapshotd import manifest as manifests
from snapshotd.adapters.object_store.directory import DirectoryObjects
from snapshotd.adapters.snapshot_store.directory import (
    FETCHED,
    PUBLISHED,
    QUARANTINE,
    STAGED,
    DirectoryStore,
    sync,
    unknown,
)
from snapshotd.failpoints import Failpoints
from snapshotd.model import CacheEntry, ImageFile, Manifest, Snapshot
from snapshotd.repository.model import PublishedSnapshot
from snapshotd.repository.object_keys import manifest_key
from snapshotd.repository.ports import KeyWrapper
from snapshotd.repository.repository import Repository
from snapshotd.repository.signing import Signer, TrustedKeys
from snapshotd.repository.workers import Limits

log = structlog.get_logger(__name__)


class SealedStore:
    """Snapshots of this node, at rest on its disk and in use in its memory.

    Args:
        root: where snapshots are at rest.
        unsealed: where their image files are while they are used; in memory.
        signer: signs them, and only what it has signed is read.
        wrapper: wraps their data keys.
        threads: threads that compress and encrypt.
    """

    def __init__(
        self,
        root: Path,
        unsealed: DirectoryStore,
        signer: Signer,
        wrapper: KeyWrapper,
        threads: int,
        failpoints: Failpoints | None = None,
    ) -> None:
        self.root = root
        self.unsealed = unsealed
        self._signer = signer
        self._wrapper = wrapper
        self._limits = Limits.of(threads)
        self._failpoints = failpoints or Failpoints()
        # Who keeps which snapshot.
        self._pins: dict[str, str] = {}
        # Sealed documents never change, so one that was verified is not read again.
        self._known: dict[str, PublishedSnapshot] = {}
        # Held while a snapshot's files come to memory or leave it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def open(self) -> None:
        """Make the directories, and remove what an earlier daemon left unfinished or unsealed.

        What its instances map must have been kept before.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self.root.glob(f"{STAGED}*"):
            log.warning("unfinished snapshot removed", snapshot=leftover.name.removeprefix(STAGED))
            shutil.rmtree(leftover)
        self.unsealed.open()
        # What an instance maps is there: where nothing is, it maps a snapshot that was deleted since.
        self._pins = {owner: pinned for owner, pinned in self._pins.items() if self._is_unsealed(pinned)}
        for path in self.unsealed.root.iterdir():
            if path.name not in self._pins.values():
                log.info("image files that nobody uses removed", snapshot=path.name)
                shutil.rmtree(path)

    async def stage(self, snapshot: str) -> Path:
        if (self.root / snapshot).exists():
            raise AlreadyExists(
                "SNAPSHOT_EXISTS",
                f"snapshots/{snapshot} exists; choose another id",
                metadata={"snapshot": snapshot},
            )
        return await self.unsealed.stage(snapshot)

    async def discard(self, snapshot: str) -> None:
        await self.unsealed.discard(snapshot)

    async def digest(self, snapshot: str) -> list[ImageFile]:
        return await self.unsealed.digest(snapshot)

    async def commit(self, manifest: Manifest, fetched_from: str = "") -> Snapshot:
        try:
            return await self._commit(manifest, fetched_from)
        except asyncio.CancelledError:
            with contextlib.suppress(NotFound):
                await self.delete(manifest.id)
            raise
        finally:
            await thread_to_completion(partial(shutil.rmtree, self._staged(manifest.id), ignore_errors=True))

    async def _commit(self, manifest: Manifest, fetched_from: str) -> Snapshot:
        name, staged = manifest.id, self._staged(manifest.id)
        async with self._lock(name):
            try:
                with self._objects(staged) as objects:
                    self._known[name] = await objects.publish(manifest, self.unsealed.staged(name))
            except ResourceExhausted as error:
                raise ResourceExhausted(
                    "DISK_FULL",
                    f"snapshots/{name} found no room in {self.root} when it was encrypted; delete snapshots",
                    metadata={"snapshot": name},
                ) from error
            await to_completion(self._settle(staged, manifest, fetched_from))
        return await self.get(name)

    async def _settle(self, staged: Path, manifest: Manifest, fetched_from: str) -> None:
        name = manifest.id
        await asyncio.to_thread(self._put_in_place, staged, name, fetched_from)
        if name in self._pins.values():
            try:
                await self.unsealed.commit(manifest, self._signer.key_id)
            except OSError as error:
                # Without room for its manifest; whoever keeps it unseals it.
                log.warning("snapshot does not stay in memory", snapshot=name, error=str(error))
        await self.unsealed.discard(name)

    def _put_in_place(self, staged: Path, snapshot: str, fetched_from: str) -> None:
        if fetched_from:
            (staged / PUBLISHED).touch(mode=0o600)
            (staged / FETCHED).write_text(fetched_from)
            sync(staged / FETCHED)
        # The objects are durable, and the names of their directories are from now on.
        for folder, _, _ in os.walk(staged, topdown=False):
            sync(Path(folder))
        staged.rename(self.root / snapshot)
        sync(self.root)

    async def get(self, snapshot: str) -> Snapshot:
        document = await self._document(snapshot)
        return await asyncio.to_thread(self._as_snapshot, document)

    async def _document(self, snapshot: str) -> PublishedSnapshot:
        if not self._manifest(snapshot).exists():
            self._known.pop(snapshot, None)
            raise unknown(snapshot)
        if snapshot not in self._known:
            with self._objects(self.root / snapshot) as objects:
                try:
                    self._known[snapshot] = await objects.get(snapshot)
                except PermissionDenied as error:
                    raise PermissionDenied(
                        error.reason,
                        f"snapshots/{snapshot} was signed here with a key that this node no longer has; put "
                        f"that key back, or stop the node and remove {self.root / snapshot}",
                        metadata=error.metadata,
                    ) from error
        return self._known[snapshot]

    def _as_snapshot(self, document: PublishedSnapshot) -> Snapshot:
        folder, marks = self.root / document.manifest.id, {QUARANTINE: "", FETCHED: ""}
        for mark in marks:
            with contextlib.suppress(FileNotFoundError):
                marks[mark] = (folder / mark).read_text()
        return Snapshot(
            document.manifest,
            manifests.digest(manifests.encode(document.manifest)),
            marks[QUARANTINE],
            published=(folder / PUBLISHED).exists(),
            signer=marks[FETCHED],
        )

    async def list(self) -> list[Snapshot]:
        found = []
        for path in self._folders():
            try:
                found.append(await self.get(path.name))
            except DumontError as error:
                log.error(
                    "snapshot cannot be read", snapshot=path.name, reason=error.reason, error=error.message
                )
        return found

    async def verify(self, snapshot: Snapshot, again: bool = False) -> None:
        """As the port says. Whatever is unsealed was verified on its way: of the rest all is read."""
        name = snapshot.manifest.id
        async with self._lock(name):
            unsealed = self._is_unsealed(name)
            if unsealed:
                await self.unsealed.verify(snapshot, again)
        if again or not unsealed:
            with self._objects(self.root / name) as objects:
                await objects.verify(await self._document(name))

    def pin(self, owner: str, snapshot: str) -> None:
        self._pins[owner] = snapshot

    async def images(self, snapshot: Snapshot) -> Path:
        async with self._lock(snapshot.manifest.id):
            if not self._is_unsealed(snapshot.manifest.id):
                await self._unseal(await self._document(snapshot.manifest.id))
        return await self.unsealed.images(snapshot)

    async def _unseal(self, document: PublishedSnapshot) -> None:
        name = document.manifest.id
        into = await self.unsealed.stage(name)
        try:
            with self._objects(self.root / name) as objects:
                await objects.fetch(document, into)
            await self.unsealed.commit(document.manifest, document.signer)
        except BaseException as error:
            await to_completion(self.unsealed.discard(name))
            if isinstance(error, ResourceExhausted):
                raise ResourceExhausted(
                    "UNSEALED_MEMORY_FULL",
                    f"snapshots/{name} has no room in memory, which {document.data_size} bytes of it would "
                    "take while it is used; stop instances of other snapshots",
                    metadata={"snapshot": name, "bytes": str(document.data_size)},
                ) from error
            raise

    async def unpin(self, owner: str) -> None:
        snapshot = self._pins.pop(owner, None)
        if snapshot is not None:
            await to_completion(self._leave_memory(snapshot))

    async def _leave_memory(self, snapshot: str) -> None:
        async with self._lock(snapshot):
            if snapshot not in self._pins.values() and self._is_unsealed(snapshot):
                await self.unsealed.delete(snapshot)

    async def quarantine(self, snapshot: str, reason: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / snapshot / QUARANTINE).write_text(reason)

    async def note_published(self, snapshot: str) -> None:
        (self.root / snapshot / PUBLISHED).touch(mode=0o600)

    async def touch(self, snapshot: str) -> None:
        now = time.time_ns()
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._manifest(snapshot), ns=(now, now))

    async def entries(self) -> Sequence[CacheEntry]:
        """What each takes where it is at rest; what it takes in memory while it is used is not counted."""
        return await asyncio.to_thread(self._entries)

    def _entries(self) -> Sequence[CacheEntry]:
        found = []
        for path in self._folders():
            with contextlib.suppress(FileNotFoundError):
                size = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
                last_use = self._manifest(path.name).stat().st_mtime
                found.append(CacheEntry(path.name, size, last_use, (path / PUBLISHED).exists()))
        return found

    async def delete(self, snapshot: str) -> None:
        path = self.root / snapshot
        if not path.is_dir():
            raise unknown(snapshot)
        self._known.pop(snapshot, None)
        doomed = self._staged(f"{snapshot}.deleted")
        path.rename(doomed)
        # Another one of the id is not theirs.
        self._pins = {owner: pinned for owner, pinned in self._pins.items() if pinned != snapshot}
        await to_completion(self._leave_memory(snapshot))
        await asyncio.to_thread(shutil.rmtree, doomed)

    def _folders(self) -> Sequence[Path]:
        return [
            path
            for path in sorted(self.root.iterdir())
            if not path.name.startswith(STAGED) and self._manifest(path.name).exists()
        ]

    def _manifest(self, snapshot: str) -> Path:
        return self.root / snapshot / manifest_key(snapshot)

    def _staged(self, snapshot: str) -> Path:
        return self.root / f"{STAGED}{snapshot}"

    def _is_unsealed(self, snapshot: str) -> bool:
        return (self.unsealed.root / snapshot).exists()

    def _lock(self, snapshot: str) -> asyncio.Lock:
        return self._locks.setdefault(snapshot, asyncio.Lock())

    @contextlib.contextmanager
    def _objects(self, folder: Path) -> Iterator[Repository]:
        """The snapshot in ``folder``, as an object store of its own."""
        objects = Repository(
            DirectoryObjects(folder),
            self._signer,
            TrustedKeys([self._signer.public]),
            self._wrapper,
            workers=self._limits.chunks,
            threads=self._limits.threads,
            failpoints=self._failpoints,
        )
        try:
            yield objects
        finally:
            objects.close()

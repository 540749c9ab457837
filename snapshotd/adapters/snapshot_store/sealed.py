"""The SnapshotStore port over encrypted snapshots, whose image files are in memory while they are in use.

``<root>/<id>/`` is a repository of one snapshot: its chunks, encrypted, and its manifest, signed by this
node. The marks lie beside them; ``fetched`` holds the signer alone, because everything here is durable.

A capture is staged in ``unsealed``, a directory in memory, and leaves it once it is sealed. A pinned snapshot
is unsealed there, once for all who pin it, and removed from there when the last of them unpins it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from dumont.aio import thread_to_completion, to_completion
from dumont.errors import NotFound, PermissionDenied, ResourceExhausted
from snapshotd import manifest as manifests
from snapshotd.adapters.object_store.directory import DirectoryObjects
from snapshotd.adapters.snapshot_store.base import FETCHED, PUBLISHED, StoreBase, unknown
from snapshotd.adapters.snapshot_store.directory import DirectoryStore
from snapshotd.failpoints import Failpoints
from snapshotd.model import ImageFile, Manifest, Snapshot
from snapshotd.repository.model import PublishedSnapshot
from snapshotd.repository.object_keys import manifest_key
from snapshotd.repository.ports import KeyWrapper
from snapshotd.repository.repository import Repository
from snapshotd.repository.signing import Signer, TrustedKeys
from snapshotd.repository.workers import Limits
from snapshotd.system.files import sync

log = structlog.get_logger(__name__)


class SealedStore(StoreBase):
    """Snapshots that are encrypted at rest, and plain in memory while they are in use.

    Args:
        root: where snapshots are at rest.
        unsealed: where their image files are while they are in use; in memory.
        signer: signs the snapshots; only what it has signed is read.
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
        super().__init__(root)
        self.unsealed = unsealed
        self._signer = signer
        self._wrapper = wrapper
        self._limits = Limits.of(threads)
        self._failpoints = failpoints or Failpoints()
        # The snapshot that each owner has pinned.
        self._pins: dict[str, str] = {}
        # A sealed document never changes, so one that was verified is not read again.
        self._known: dict[str, PublishedSnapshot] = {}
        # One for each snapshot, held while its files are brought to memory or removed from it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def open(self) -> None:
        """Make the directories, and remove what an earlier daemon left unfinished or unsealed.

        Snapshots whose files are mapped by instances must have been pinned before.
        """
        self._prepare_root()
        self.unsealed.open()
        # The files that an instance maps are there. If there are none, its snapshot has been deleted since.
        self._pins = {owner: pinned for owner, pinned in self._pins.items() if self._is_unsealed(pinned)}
        for folder in self.unsealed.root.iterdir():
            if folder.name not in self._pins.values():
                log.info("unused_image_files_removed", snapshot=folder.name)
                shutil.rmtree(folder)

    def manifest_path(self, snapshot: str) -> Path:
        """See :meth:`StoreBase.manifest_path`."""
        return self.root / snapshot / manifest_key(snapshot)

    async def stage(self, snapshot: str) -> Path:
        """See :meth:`SnapshotStore.stage`."""
        self._refuse_existing(snapshot)
        return await self.unsealed.stage(snapshot)

    async def discard(self, snapshot: str) -> None:
        """See :meth:`SnapshotStore.discard`."""
        await self.unsealed.discard(snapshot)

    async def digest(self, snapshot: str) -> list[ImageFile]:
        """See :meth:`SnapshotStore.digest`."""
        return await self.unsealed.digest(snapshot)

    async def commit(self, manifest: Manifest, fetched_from: str = "") -> Snapshot:
        """See :meth:`SnapshotStore.commit`."""
        try:
            return await self._commit(manifest, fetched_from)
        except asyncio.CancelledError:
            with contextlib.suppress(NotFound):
                await self.delete(manifest.id)
            raise
        finally:
            await thread_to_completion(partial(shutil.rmtree, self.staged(manifest.id), ignore_errors=True))

    async def _commit(self, manifest: Manifest, fetched_from: str) -> Snapshot:
        name, staged = manifest.id, self.staged(manifest.id)
        async with self._lock(name):
            try:
                with self._repository(staged) as repository:
                    self._known[name] = await repository.publish(manifest, self.unsealed.staged(name))
            except ResourceExhausted as error:
                raise ResourceExhausted(
                    "DISK_FULL",
                    f"there was no room in {self.root} to encrypt snapshots/{name}; delete snapshots",
                    metadata={"snapshot": name},
                ) from error
            await to_completion(self._settle(staged, manifest, fetched_from))
        return await self.get(name)

    async def _settle(self, staged: Path, manifest: Manifest, fetched_from: str) -> None:
        """Put a sealed snapshot in its place, and keep its files unsealed if somebody has pinned it."""
        name = manifest.id
        await asyncio.to_thread(self._put_in_place, staged, name, fetched_from)
        if name in self._pins.values():
            try:
                await self.unsealed.commit(manifest, self._signer.key_id)
            except OSError as error:
                # There is no room for its manifest. Whoever pinned the snapshot unseals it.
                log.warning("snapshot_not_left_unsealed", snapshot=name, error=str(error))
        await self.unsealed.discard(name)

    def _put_in_place(self, staged: Path, snapshot: str, fetched_from: str) -> None:
        if fetched_from:
            (staged / PUBLISHED).touch(mode=0o600)
            (staged / FETCHED).write_text(fetched_from)
            sync(staged / FETCHED)
        # The objects are durable already; this makes the names of their directories durable too.
        for folder, _, _ in os.walk(staged, topdown=False):
            sync(Path(folder))
        staged.rename(self.root / snapshot)
        sync(self.root)

    async def get(self, snapshot: str) -> Snapshot:
        """See :meth:`SnapshotStore.get`."""
        document = await self._document(snapshot)
        return await asyncio.to_thread(self._as_snapshot, document)

    async def _document(self, snapshot: str) -> PublishedSnapshot:
        if not self.manifest_path(snapshot).exists():
            self._known.pop(snapshot, None)
            raise unknown(snapshot)
        if snapshot not in self._known:
            with self._repository(self.root / snapshot) as repository:
                try:
                    self._known[snapshot] = await repository.get(snapshot)
                except PermissionDenied as error:
                    raise PermissionDenied(
                        error.reason,
                        f"snapshots/{snapshot} was signed with a key that this node no longer has; put that "
                        f"key back, or stop the node and remove {self.root / snapshot}",
                        metadata=error.metadata,
                    ) from error
        return self._known[snapshot]

    def _as_snapshot(self, document: PublishedSnapshot) -> Snapshot:
        reason, published, signer = self._marks(document.manifest.id)
        digest = manifests.digest(manifests.encode(document.manifest))
        return Snapshot(document.manifest, digest, reason, published=published, signer=signer)

    async def verify(self, snapshot: Snapshot, again: bool = False) -> None:
        """See :meth:`SnapshotStore.verify`. A snapshot that is not unsealed is always read in full."""
        name = snapshot.manifest.id
        async with self._lock(name):
            unsealed = self._is_unsealed(name)
            if unsealed:
                await self.unsealed.verify(snapshot, again)
        if again or not unsealed:
            with self._repository(self.root / name) as repository:
                await repository.verify(await self._document(name))

    def pin(self, owner: str, snapshot: str) -> None:
        """See :meth:`SnapshotStore.pin`."""
        self._pins[owner] = snapshot

    async def images(self, snapshot: Snapshot) -> Path:
        """See :meth:`SnapshotStore.images`."""
        async with self._lock(snapshot.manifest.id):
            if not self._is_unsealed(snapshot.manifest.id):
                await self._unseal(await self._document(snapshot.manifest.id))
        return await self.unsealed.images(snapshot)

    async def _unseal(self, document: PublishedSnapshot) -> None:
        name = document.manifest.id
        into = await self.unsealed.stage(name)
        try:
            with self._repository(self.root / name) as repository:
                await repository.fetch(document, into)
            await self.unsealed.commit(document.manifest, document.signer)
        except BaseException as error:
            await to_completion(self.unsealed.discard(name))
            if isinstance(error, ResourceExhausted):
                raise ResourceExhausted(
                    "UNSEALED_MEMORY_FULL",
                    f"snapshots/{name} needs {document.data_size} bytes of memory while it is in use, and "
                    "they are not free; stop instances of other snapshots",
                    metadata={"snapshot": name, "bytes": str(document.data_size)},
                ) from error
            raise

    async def unpin(self, owner: str) -> None:
        """See :meth:`SnapshotStore.unpin`."""
        snapshot = self._pins.pop(owner, None)
        if snapshot is not None:
            await to_completion(self._remove_unpinned(snapshot))

    async def _remove_unpinned(self, snapshot: str) -> None:
        async with self._lock(snapshot):
            if snapshot not in self._pins.values() and self._is_unsealed(snapshot):
                await self.unsealed.delete(snapshot)

    async def delete(self, snapshot: str) -> None:
        """See :meth:`SnapshotStore.delete`."""
        hidden = self._hide(snapshot)
        self._known.pop(snapshot, None)
        # A later snapshot of the same id is not the one that they pinned.
        self._pins = {owner: pinned for owner, pinned in self._pins.items() if pinned != snapshot}
        await to_completion(self._remove_unpinned(snapshot))
        await asyncio.to_thread(shutil.rmtree, hidden)

    def _is_unsealed(self, snapshot: str) -> bool:
        return (self.unsealed.root / snapshot).exists()

    def _lock(self, snapshot: str) -> asyncio.Lock:
        return self._locks.setdefault(snapshot, asyncio.Lock())

    @contextlib.contextmanager
    def _repository(self, folder: Path) -> Iterator[Repository]:
        """The snapshot in ``folder`` as a repository of its own."""
        repository = Repository(
            DirectoryObjects(folder),
            self._signer,
            TrustedKeys([self._signer.public]),
            self._wrapper,
            workers=self._limits.chunks,
            threads=self._limits.threads,
            failpoints=self._failpoints,
        )
        try:
            yield repository
        finally:
            repository.close()

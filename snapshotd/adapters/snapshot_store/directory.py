"""The SnapshotStore port over a directory of this node.

``<root>/<id>/`` holds the image files and, written last, ``manifest.json``. The mark ``fetched`` holds the
boot id and, on a second line, the key that signed the snapshot. A fetched snapshot is not synced, so after
another boot it is removed and fetched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import structlog
from blake3 import blake3

from dumont.aio import thread_to_completion
from dumont.errors import AlreadyExists, DataLoss, NotFound
from snapshotd import manifest as manifests
from snapshotd.adapters.snapshot_store.base import FETCHED, PUBLISHED, StoreBase, exists, unknown
from snapshotd.model import ImageFile, Manifest, Snapshot
from snapshotd.system.files import sync
from snapshotd.system.hashing import update_from

log = structlog.get_logger(__name__)

Identity = tuple[str, int, int, int]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Files larger than this, in bytes, are hashed by several threads.
BLOCK = 4 << 20


class DirectoryStore(StoreBase):
    """Plain snapshots.

    Args:
        root: holds a directory for each snapshot.
        threads: threads that hash files.
    """

    def __init__(self, root: Path, threads: int) -> None:
        super().__init__(root)
        self.threads = threads
        self._cache: dict[str, Snapshot] = {}
        # By snapshot: the identities of its files when they were last read in full and found intact.
        self._verified: dict[str, tuple[Identity, ...]] = {}

    def open(self) -> None:
        """Make the directory, and remove unfinished snapshots and those fetched before this boot."""
        self._prepare_root()
        # Names with a leading dot are no snapshots of this store.
        for mark in self.root.glob(f"[!.]*/{FETCHED}"):
            boot, _, signer = mark.read_text().partition("\n")
            # Without its signer it could not be checked at a restore whether the key is still trusted.
            if boot != BOOT_ID.read_text().strip() or not signer:
                log.info("fetched_snapshot_of_earlier_boot_removed", snapshot=mark.parent.name)
                shutil.rmtree(mark.parent)

    def manifest_path(self, snapshot: str) -> Path:
        """See :meth:`StoreBase.manifest_path`."""
        return self.root / snapshot / manifests.NAME

    async def stage(self, snapshot: str) -> Path:
        """See :meth:`SnapshotStore.stage`."""
        self._refuse_existing(snapshot)
        try:
            self.staged(snapshot).mkdir(mode=0o700)
        except FileExistsError:
            raise AlreadyExists(
                "SNAPSHOT_IN_PROGRESS",
                f"snapshots/{snapshot} is being captured or fetched; choose another id",
                metadata={"snapshot": snapshot},
            ) from None
        return self.staged(snapshot)

    async def discard(self, snapshot: str) -> None:
        """See :meth:`SnapshotStore.discard`."""
        await asyncio.to_thread(shutil.rmtree, self.staged(snapshot), ignore_errors=True)

    async def digest(self, snapshot: str) -> list[ImageFile]:
        """See :meth:`SnapshotStore.digest`."""
        before = await asyncio.to_thread(identify, self.staged(snapshot))
        files = await digest_files(self.staged(snapshot), self.threads)
        # They have just been read in full: unless somebody writes to them, the first restore need not.
        self._verified[snapshot] = before
        return files

    async def commit(self, manifest: Manifest, fetched_from: str = "") -> Snapshot:
        """See :meth:`SnapshotStore.commit`."""
        try:
            snapshot = await thread_to_completion(partial(self._commit, manifest, fetched_from))
        except asyncio.CancelledError:
            with contextlib.suppress(NotFound):
                await self.delete(manifest.id)
            raise
        if fetched_from:
            # Every chunk was verified when it was written.
            self._verified[manifest.id] = await asyncio.to_thread(identify, self._folder(snapshot))
        return snapshot

    async def get(self, snapshot: str) -> Snapshot:
        """See :meth:`SnapshotStore.get`."""
        # The files of a snapshot never change, so it is enough to ask whether they are still there.
        if snapshot not in self._cache or not self.manifest_path(snapshot).exists():
            self._cache.pop(snapshot, None)
            self._cache[snapshot] = await asyncio.to_thread(self._read, snapshot)
        return self._cache[snapshot]

    async def verify(self, snapshot: Snapshot, again: bool = False) -> None:
        """See :meth:`SnapshotStore.verify`."""
        identities = await asyncio.to_thread(identify, self._folder(snapshot))
        if again or self._verified.get(snapshot.manifest.id) != identities:
            await self._read_all(snapshot)
            self._verified[snapshot.manifest.id] = identities

    async def _read_all(self, snapshot: Snapshot) -> None:
        actual = {file.name: file for file in await digest_files(self._folder(snapshot), self.threads)}
        # CRIU reads every file whose name it knows, so there must be none but the snapshot's own.
        if strangers := sorted(set(actual) - {file.name for file in snapshot.manifest.files}):
            raise DataLoss(
                "IMAGE_DAMAGED",
                f"{strangers[0]} is no file of snapshots/{snapshot.manifest.id} and lies among them",
                metadata={"file": strangers[0], "snapshot": snapshot.manifest.id},
            )
        for file in snapshot.manifest.files:
            found = actual.get(file.name)
            if found != file:
                what = (
                    "is missing"
                    if found is None
                    else f"has {found.size} bytes"
                    if found.size != file.size
                    else "has other bytes"
                )
                raise DataLoss(
                    "IMAGE_DAMAGED",
                    f"{file.name} of snapshots/{snapshot.manifest.id} {what}; {file.size} bytes with digest "
                    f"{file.digest[:16]}… were captured",
                    metadata={"file": file.name, "snapshot": snapshot.manifest.id},
                )

    def pin(self, owner: str, snapshot: str) -> None:
        """Do nothing: plain image files stay until their snapshot is deleted."""

    async def images(self, snapshot: Snapshot) -> Path:
        """See :meth:`SnapshotStore.images`."""
        return self._folder(snapshot)

    async def unpin(self, owner: str) -> None:
        """Do nothing, as :meth:`pin` does."""

    async def quarantine(self, snapshot: str, reason: str) -> None:
        """See :meth:`SnapshotStore.quarantine`."""
        self._cache.pop(snapshot, None)
        await super().quarantine(snapshot, reason)

    async def note_published(self, snapshot: str) -> None:
        """See :meth:`SnapshotStore.note_published`."""
        await super().note_published(snapshot)
        self._cache.pop(snapshot, None)

    async def delete(self, snapshot: str) -> None:
        """See :meth:`SnapshotStore.delete`."""
        hidden = self._hide(snapshot)
        self._cache.pop(snapshot, None)
        self._verified.pop(snapshot, None)
        await asyncio.to_thread(shutil.rmtree, hidden)

    def _folder(self, snapshot: Snapshot) -> Path:
        return self.root / snapshot.manifest.id

    def _commit(self, manifest: Manifest, fetched_from: str) -> Snapshot:
        staged = self.staged(manifest.id)
        data = manifests.encode(manifest)
        if fetched_from:
            (staged / PUBLISHED).touch(mode=0o600)
            (staged / FETCHED).write_text(f"{BOOT_ID.read_text().strip()}\n{fetched_from}")
            (staged / manifests.NAME).write_bytes(data)
        else:
            for file in manifest.files:
                sync(staged / file.name)
            (staged / manifests.NAME).write_bytes(data)
            sync(staged / manifests.NAME)
            sync(staged)
        target = self.root / manifest.id
        if target.exists():
            raise exists(manifest.id)
        staged.rename(target)
        if not fetched_from:
            sync(self.root)
        return Snapshot(manifest, manifests.digest(data), published=bool(fetched_from), signer=fetched_from)

    def _read(self, snapshot: str) -> Snapshot:
        try:
            data = self.manifest_path(snapshot).read_bytes()
        except FileNotFoundError:
            raise unknown(snapshot) from None
        manifest = manifests.decode(data)
        if manifest.id != snapshot:
            raise DataLoss(
                "MANIFEST_DAMAGED",
                f"the manifest of snapshots/{snapshot} is that of snapshots/{manifest.id}",
                metadata={"snapshot": snapshot},
            )
        reason, published, fetched = self._marks(snapshot)
        signer = fetched.partition("\n")[2]
        return Snapshot(manifest, manifests.digest(data), reason, published=published, signer=signer)


def identify(folder: Path) -> tuple[Identity, ...]:
    """The name, inode, size and change time of every image file in ``folder``.

    Any write changes a file's change time, and nobody can set that back.
    """
    statuses = [(path.name, path.stat()) for path in sorted(folder.glob("*.img"))]
    return tuple((name, status.st_ino, status.st_size, status.st_ctime_ns) for name, status in statuses)


async def digest_files(folder: Path, threads: int) -> list[ImageFile]:
    """The size and BLAKE3 of every image file in ``folder``, by name; CRIU's logs and statistics are none."""
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".img")

    def work() -> list[ImageFile]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(_digest, paths))

    return await thread_to_completion(work)


def _digest(path: Path) -> ImageFile:
    hasher = blake3(max_threads=blake3.AUTO) if path.stat().st_size > BLOCK else blake3()
    update_from(hasher, path)
    return ImageFile(path.name, path.stat().st_size, hasher.hexdigest())

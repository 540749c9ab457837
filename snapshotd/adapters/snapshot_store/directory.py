"""The SnapshotStore port over a directory of this node.

``snapshots/<id>/`` holds the image files and, written last, ``manifest.json``; ``snapshots/.staged-<id>/``
is a snapshot in the making, which no list shows and the next start of the daemon removes. ``published``
in it says that it is in the object store as well, ``fetched`` that it came from there, with the boot in
which it did, and on a second line the key that signed it: nothing of it was synced, so after another boot it
is removed and fetched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import structlog
from blake3 import blake3

from dumont.aio import thread_to_completion
from dumont.errors import AlreadyExists, DataLoss, DumontError, NotFound
from snapshotd import manifest as manifests
from snapshotd.model import CacheEntry, ImageFile, Manifest, Snapshot
from snapshotd.system.hashing import update_from

log = structlog.get_logger(__name__)

Identity = tuple[str, int, int, int]

STAGED = ".staged-"
QUARANTINE = "quarantine"
PUBLISHED = "published"
FETCHED = "fetched"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
BLOCK = 4 << 20


class DirectoryStore:
    def __init__(self, root: Path, threads: int) -> None:
        self.root = root
        self.threads = threads
        self._cache: dict[str, Snapshot] = {}
        # What was last read whole and found right, as the file system then knew it.
        self._verified: dict[str, tuple[Identity, ...]] = {}

    def open(self) -> None:
        """Make the directory and remove what an earlier daemon left unfinished."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self.root.glob(f"{STAGED}*"):
            log.warning("unfinished snapshot removed", snapshot=leftover.name.removeprefix(STAGED))
            shutil.rmtree(leftover)
        # What is hidden here is none of its snapshots.
        for mark in self.root.glob(f"[!.]*/{FETCHED}"):
            boot, _, signer = mark.read_text().partition("\n")
            # Who signed it is asked at each restore; without an answer it is fetched again.
            if boot != BOOT_ID.read_text().strip() or not signer:
                log.info("fetched snapshot of an earlier boot removed", snapshot=mark.parent.name)
                shutil.rmtree(mark.parent)

    async def stage(self, snapshot: str) -> Path:
        if (self.root / snapshot).exists():
            raise AlreadyExists(
                "SNAPSHOT_EXISTS",
                f"snapshots/{snapshot} exists; choose another id",
                metadata={"snapshot": snapshot},
            )
        try:
            self.staged(snapshot).mkdir(mode=0o700)
        except FileExistsError:
            raise AlreadyExists(
                "SNAPSHOT_IN_PROGRESS", f"snapshots/{snapshot} is being made", metadata={"snapshot": snapshot}
            ) from None
        return self.staged(snapshot)

    async def discard(self, snapshot: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self.staged(snapshot), ignore_errors=True)

    async def digest(self, snapshot: str) -> list[ImageFile]:
        before = await asyncio.to_thread(identify, self.staged(snapshot))
        files = await digest_files(self.staged(snapshot), self.threads)
        # Read whole a moment ago: unless somebody writes to them, the first restore need not read them again.
        self._verified[snapshot] = before
        return files

    async def commit(self, manifest: Manifest, fetched_from: str = "") -> Snapshot:
        try:
            snapshot = await thread_to_completion(partial(self._commit, manifest, fetched_from))
        except asyncio.CancelledError:
            with contextlib.suppress(NotFound):
                await self.delete(manifest.id)
            raise
        if fetched_from:
            # Every chunk was verified when it was put here.
            self._verified[manifest.id] = await asyncio.to_thread(identify, self._images(snapshot))
        return snapshot

    async def get(self, snapshot: str) -> Snapshot:
        # The files never change once they are there, so only their presence is asked again.
        if snapshot not in self._cache or not (self.root / snapshot / manifests.NAME).exists():
            self._cache.pop(snapshot, None)
            self._cache[snapshot] = await asyncio.to_thread(self._read, snapshot)
        return self._cache[snapshot]

    async def list(self) -> list[Snapshot]:
        found = []
        for path in sorted(self.root.glob(f"*/{manifests.NAME}")):
            if path.parent.name.startswith(STAGED):
                continue
            try:
                found.append(await self.get(path.parent.name))
            except DumontError as error:
                log.error(
                    "snapshot cannot be read",
                    snapshot=path.parent.name,
                    reason=error.reason,
                    error=error.message,
                )
        return found

    async def verify(self, snapshot: Snapshot, again: bool = False) -> None:
        """As the port says; files that nobody has written to since they were last read are not read again."""
        identities = await asyncio.to_thread(identify, self._images(snapshot))
        if again or self._verified.get(snapshot.manifest.id) != identities:
            await self._read_all(snapshot)
            self._verified[snapshot.manifest.id] = identities

    async def _read_all(self, snapshot: Snapshot) -> None:
        actual = {file.name: file for file in await digest_files(self._images(snapshot), self.threads)}
        # CRIU reads whatever lies there under a name that it knows.
        if strangers := sorted(set(actual) - {file.name for file in snapshot.manifest.files}):
            raise DataLoss(
                "IMAGE_DAMAGED",
                f"{strangers[0]} of snapshots/{snapshot.manifest.id} was not written with it",
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
                    else "differs"
                )
                raise DataLoss(
                    "IMAGE_DAMAGED",
                    f"{file.name} of snapshots/{snapshot.manifest.id} {what}; {file.size} bytes with digest "
                    f"{file.digest[:16]}… were written",
                    metadata={"file": file.name, "snapshot": snapshot.manifest.id},
                )

    def pin(self, owner: str, snapshot: str) -> None:
        """They stay for everybody."""

    async def images(self, snapshot: Snapshot) -> Path:
        return self._images(snapshot)

    async def unpin(self, owner: str) -> None:
        """As they were there before, they stay."""

    async def quarantine(self, snapshot: str, reason: str) -> None:
        self._cache.pop(snapshot, None)
        # Deleted meanwhile, there is nothing left to keep from being restored.
        with contextlib.suppress(FileNotFoundError):
            (self.root / snapshot / QUARANTINE).write_text(reason)

    async def note_published(self, snapshot: str) -> None:
        (self.root / snapshot / PUBLISHED).touch(mode=0o600)
        self._cache.pop(snapshot, None)

    async def touch(self, snapshot: str) -> None:
        # The time of day, finer than the file system's own idea of now.
        now = time.time_ns()
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / snapshot / manifests.NAME, ns=(now, now))

    async def entries(self) -> Sequence[CacheEntry]:
        return await asyncio.to_thread(self._entries)

    def _entries(self) -> Sequence[CacheEntry]:
        found = []
        for path in sorted(self.root.glob(f"*/{manifests.NAME}")):
            if path.parent.name.startswith(STAGED):
                continue
            with contextlib.suppress(FileNotFoundError):
                size = sum(file.stat().st_blocks * 512 for file in path.parent.iterdir())
                published = (path.parent / PUBLISHED).exists()
                found.append(CacheEntry(path.parent.name, size, path.stat().st_mtime, published))
        return found

    async def delete(self, snapshot: str) -> None:
        path = self.root / snapshot
        if not path.is_dir():
            raise unknown(snapshot)
        self._cache.pop(snapshot, None)
        self._verified.pop(snapshot, None)
        # Renamed first, so that it is gone from every list before the first file is.
        doomed = self.staged(f"{snapshot}.deleted")
        path.rename(doomed)
        await asyncio.to_thread(shutil.rmtree, doomed)

    def _images(self, snapshot: Snapshot) -> Path:
        return self.root / snapshot.manifest.id

    def staged(self, snapshot: str) -> Path:
        """Where the files of a snapshot in the making are."""
        return self.root / f"{STAGED}{snapshot}"

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
            raise AlreadyExists(
                "SNAPSHOT_EXISTS", f"snapshots/{manifest.id} exists", metadata={"snapshot": manifest.id}
            )
        staged.rename(target)
        if not fetched_from:
            sync(self.root)
        return Snapshot(manifest, manifests.digest(data), published=bool(fetched_from), signer=fetched_from)

    def _read(self, snapshot: str) -> Snapshot:
        folder = self.root / snapshot
        try:
            data = (folder / manifests.NAME).read_bytes()
        except FileNotFoundError:
            raise unknown(snapshot) from None
        manifest = manifests.decode(data)
        if manifest.id != snapshot:
            raise DataLoss(
                "MANIFEST_DAMAGED",
                f"the manifest of snapshots/{snapshot} is that of snapshots/{manifest.id}",
                metadata={"snapshot": snapshot},
            )
        reason = signer = ""
        with contextlib.suppress(FileNotFoundError):
            reason = (folder / QUARANTINE).read_text()
        with contextlib.suppress(FileNotFoundError):
            signer = (folder / FETCHED).read_text().partition("\n")[2]
        published = (folder / PUBLISHED).exists()
        return Snapshot(manifest, manifests.digest(data), reason, published=published, signer=signer)


def identify(folder: Path) -> tuple[Identity, ...]:
    """What the file system says of every image file in ``folder``.

    Any write changes a file's change time, which nobody can set back.
    """
    statuses = [(path.name, path.stat()) for path in sorted(folder.glob("*.img"))]
    return tuple((name, status.st_ino, status.st_size, status.st_ctime_ns) for name, status in statuses)


async def digest_files(folder: Path, threads: int) -> list[ImageFile]:
    """Size and BLAKE3 of every image file in ``folder``, by name; logs and statistics are none."""
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".img")

    def work() -> list[ImageFile]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(_digest, paths))

    return await thread_to_completion(work)


def _digest(path: Path) -> ImageFile:
    hasher = blake3(max_threads=blake3.AUTO) if path.stat().st_size > BLOCK else blake3()
    update_from(hasher, path)
    return ImageFile(path.name, path.stat().st_size, hasher.hexdigest())


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unknown(snapshot: str) -> NotFound:
    return NotFound(
        "SNAPSHOT_NOT_FOUND", f"this node has no snapshots/{snapshot}", metadata={"snapshot": snapshot}
    )

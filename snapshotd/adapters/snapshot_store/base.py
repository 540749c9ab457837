"""What both snapshot stores share: a directory per snapshot, named by its id, with marks beside the manifest.

``<root>/.staged-<id>/`` is a snapshot in the making, or one that is being deleted. No list shows it, and the
next start of the daemon removes it. The marks are files: ``published`` says that the snapshot is in the
object store too, ``quarantine`` why it must not be restored, ``fetched`` that it came from the object store.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import structlog

from dumont.errors import AlreadyExists, DumontError, NotFound
from snapshotd.model import CacheEntry, Snapshot

log = structlog.get_logger(__name__)

STAGED = ".staged-"
QUARANTINE = "quarantine"
PUBLISHED = "published"
FETCHED = "fetched"


class StoreBase(ABC):
    """The part of the SnapshotStore port that concerns directories and marks.

    Args:
        root: holds a directory for each snapshot.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unreadable: dict[str, DumontError] = {}

    @abstractmethod
    async def get(self, snapshot: str) -> Snapshot:
        """See :meth:`SnapshotStore.get`."""

    @abstractmethod
    def manifest_path(self, snapshot: str) -> Path:
        """Where the manifest of a snapshot lies. The snapshot exists if this file does."""

    async def list(self) -> list[Snapshot]:
        """See :meth:`SnapshotStore.list`. A snapshot that cannot be read is logged, once, and left out."""
        found, unreadable = [], {}
        for folder in self._folders():
            try:
                found.append(await self.get(folder.name))
            except DumontError as error:
                unreadable[folder.name] = error
                if folder.name not in self.unreadable:
                    log.error(
                        "snapshot_unreadable", snapshot=folder.name, reason=error.reason, error=error.message
                    )
        self.unreadable = unreadable
        return found

    async def entries(self) -> Sequence[CacheEntry]:
        """See :meth:`SnapshotStore.entries`. Counted is what lies below ``root``."""
        return await asyncio.to_thread(self._entries)

    async def touch(self, snapshot: str) -> None:
        """See :meth:`SnapshotStore.touch`."""
        # The clock's time of day, which is finer than the file system's.
        now = time.time_ns()
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.manifest_path(snapshot), ns=(now, now))

    async def quarantine(self, snapshot: str, reason: str) -> None:
        """See :meth:`SnapshotStore.quarantine`."""
        try:
            (self.root / snapshot / QUARANTINE).write_text(reason)
        except FileNotFoundError:
            # A snapshot that was deleted meanwhile cannot be restored anyway.
            return
        except OSError as error:
            # The next restore finds again what is wrong with it.
            log.error("snapshot_not_quarantined", snapshot=snapshot, reason=reason, error=str(error))

    async def note_published(self, snapshot: str) -> None:
        """See :meth:`SnapshotStore.note_published`."""
        (self.root / snapshot / PUBLISHED).touch(mode=0o600)

    def staged(self, snapshot: str) -> Path:
        """Where the files of a snapshot in the making are."""
        return self.root / f"{STAGED}{snapshot}"

    def _prepare_root(self) -> None:
        """Make the root, and remove what an earlier daemon left unfinished."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self.root.glob(f"{STAGED}*"):
            log.warning("unfinished_snapshot_removed", snapshot=leftover.name.removeprefix(STAGED))
            shutil.rmtree(leftover)

    def _refuse_existing(self, snapshot: str) -> None:
        """Raise ``AlreadyExists`` if there is a snapshot of that id."""
        if (self.root / snapshot).exists():
            raise exists(snapshot)

    def _hide(self, snapshot: str) -> Path:
        """Take a snapshot out of every list at once, before its first file is removed.

        Returns:
            The directory to remove.

        Raises:
            NotFound: there is no such snapshot.
        """
        folder = self.root / snapshot
        if not folder.is_dir():
            raise unknown(snapshot)
        hidden = self.staged(f"{snapshot}.deleted")
        folder.rename(hidden)
        return hidden

    def _marks(self, snapshot: str) -> tuple[str, bool, str]:
        """The text of ``quarantine``, whether there is ``published``, and the text of ``fetched``."""
        folder, texts = self.root / snapshot, {QUARANTINE: "", FETCHED: ""}
        for mark in texts:
            with contextlib.suppress(FileNotFoundError):
                texts[mark] = (folder / mark).read_text()
        return texts[QUARANTINE], (folder / PUBLISHED).exists(), texts[FETCHED]

    def _folders(self) -> Sequence[Path]:
        return [
            folder
            for folder in sorted(self.root.iterdir())
            if not folder.name.startswith(STAGED) and self.manifest_path(folder.name).exists()
        ]

    def _entries(self) -> Sequence[CacheEntry]:
        found = []
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError):
                size = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
                last_use = self.manifest_path(folder.name).stat().st_mtime
                found.append(CacheEntry(folder.name, size, last_use, (folder / PUBLISHED).exists()))
        return found


def exists(snapshot: str) -> AlreadyExists:
    """The error for an id that is taken."""
    return AlreadyExists(
        "SNAPSHOT_EXISTS",
        f"snapshots/{snapshot} exists; choose another id",
        metadata={"snapshot": snapshot},
    )


def unknown(snapshot: str) -> NotFound:
    """The error for an id that no snapshot of this node has."""
    return NotFound(
        "SNAPSHOT_NOT_FOUND", f"this node has no snapshots/{snapshot}", metadata={"snapshot": snapshot}
    )

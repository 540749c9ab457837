"""The weight cache: which weight files are in memory, and who has pinned them."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client import Counter, Gauge

from snapshotd import eviction
from snapshotd.eviction import Candidate
from snapshotd.weights import mount
from snapshotd.weights.copying import copy

log = structlog.get_logger(__name__)

BYTES = Gauge("dumont_weight_cache_bytes", "Weight files in memory, and those on their way there.")
EVICTIONS = Counter("dumont_weight_cache_evictions_total", "Weight files that left for others.")

PARTIAL = ".partial-"
EVICTED = ".evicted-"
DIGEST = re.compile(r"[0-9a-f]{64}")
# A shard of a large model each; within a file several threads copy.
FILES_AT_ONCE = 4


@dataclass
class _Entry:
    size: int
    last_use: float


class WeightCache:
    """Files named by the BLAKE3 of their bytes, in a tmpfs at ``directory``.

    A file gets its name once all of it has been copied and hashed. Until then it is a partial file, which the
    next daemon removes. A pinned file is not evicted.

    Args:
        budget: bytes that all files may take.
        threads: threads that copy one file.
        now: the time of day, in seconds since the epoch.

    Attributes:
        on_eviction: awaited after files were evicted. When it returns, nobody else holds their memory.
        on_fill: called with the digest of a new file.
    """

    def __init__(
        self, directory: Path, budget: int, threads: int, now: Callable[[], float] = time.time
    ) -> None:
        self.directory = directory
        self.budget = budget
        self.on_eviction: Callable[[], Awaitable[None]] = _nothing
        self.on_fill: Callable[[str], None] = lambda digest: None
        self.threads = threads
        self._now = now
        self._entries: dict[str, _Entry] = {}
        self._pins: dict[str, set[str]] = {}
        self._reserved = 0
        self._partials = 0
        self._emptying = asyncio.Lock()
        self._copying = asyncio.Semaphore(FILES_AT_ONCE)

    def open(self) -> None:
        """Mount the cache, or take it over from an earlier daemon.

        Raises:
            FailedPrecondition: WEIGHT_CACHE_UNUSABLE.
        """
        self.directory.mkdir(mode=0o700, exist_ok=True)
        # An earlier daemon may have had a larger budget, and its instances still use the files.
        there = mount.used(self.directory) if mount.mounted(self.directory) else 0
        mount.mount(self.directory, max(self.budget, there))
        self.read()

    def read(self) -> None:
        """List the files in the directory, and remove partial ones."""
        for path in self.directory.iterdir():
            if DIGEST.fullmatch(path.name):
                status = path.stat()
                self._entries[path.name] = _Entry(occupied(status.st_size), status.st_mtime)
            else:
                path.unlink()
        self._show()

    def close(self) -> None:
        """Unmount the cache, unless an instance uses it; then the next daemon takes it over."""
        if not self._pins:
            mount.unmount(self.directory)

    def digests(self) -> list[str]:
        """The complete files, the most recently used first."""
        return sorted(self._entries, key=lambda digest: self._entries[digest].last_use, reverse=True)

    def pin(self, owner: str, digest: str) -> bool:
        """Pin a file for ``owner``; False if it is not in the cache."""
        if digest not in self._entries:
            return False
        self._pins.setdefault(owner, set()).add(digest)
        self._touch(digest)
        return True

    def unpin(self, owner: str) -> None:
        """Remove the pins of ``owner``, if it has any."""
        for digest in self._pins.pop(owner, ()):
            self._touch(digest)

    def reserve(self, size: int) -> bool:
        """Reserve ``size`` bytes, evicting the least recently used files that nobody has pinned.

        Returns:
            False if there is too little space; then nothing has been evicted.
        """
        pinned = set().union(*self._pins.values())
        kept = [Candidate("", self._reserved, 0.0, removable=False)]
        entries = [
            Candidate(name, entry.size, entry.last_use, removable=name not in pinned)
            for name, entry in self._entries.items()
        ]
        evicted, short = eviction.choose([*kept, *entries], self.budget, size)
        if short > 0:
            return False
        for digest in evicted:
            # The file loses its name at once. Its memory is freed when somebody needs it.
            (self.directory / digest).rename(self.directory / f"{EVICTED}{digest}")
            del self._entries[digest]
            EVICTIONS.inc()
            log.info("weights_evicted", digest=digest)
        self._reserved += size
        self._show()
        return True

    async def fill(self, source: Path, reserved: int, owners: Iterable[str]) -> str:
        """Copy a file into the cache.

        Args:
            reserved: bytes that :meth:`reserve` has reserved for it.
            owners: get the file pinned; read once the file is complete.

        Returns:
            The file's digest.

        Raises:
            OSError: the file could not be read, or the machine has less memory than the budget.
        """
        self._partials += 1
        partial = self.directory / f"{PARTIAL}{self._partials}"
        try:
            async with self._emptying:
                await self._remove_evicted()
            async with self._copying:
                digest = await self._copy(source, partial)
            if digest not in self._entries:
                partial.rename(self.directory / digest)
                self._entries[digest] = _Entry(reserved, self._now())
                self.on_fill(digest)
            for owner in owners:
                self.pin(owner, digest)
            return digest
        finally:
            self._reserved -= reserved
            partial.unlink(missing_ok=True)
            self._show()

    async def _copy(self, source: Path, partial: Path) -> str:
        return await asyncio.to_thread(copy, source, partial, self.threads)

    async def _remove_evicted(self) -> None:
        """Free the memory of evicted files, which another file needs."""
        evicted = list(self.directory.glob(f"{EVICTED}*"))
        if evicted:
            await self.on_eviction()
            await asyncio.to_thread(_unlink, evicted)

    def _touch(self, digest: str) -> None:
        entry = self._entries[digest]
        entry.last_use = self._now()
        # Recorded in the file for the next daemon.
        os.utime(self.directory / digest, (entry.last_use, entry.last_use))

    def used(self) -> int:
        """Bytes of all files, those on their way included."""
        return self._reserved + sum(entry.size for entry in self._entries.values())

    def _show(self) -> None:
        BYTES.set(self.used())


async def _nothing() -> None:
    """Do nothing: nobody else holds the memory of evicted files."""


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()


def occupied(size: int) -> int:
    """Bytes that a file of ``size`` bytes takes, in whole huge pages."""
    return -(-size // mount.HUGE_PAGE) * mount.HUGE_PAGE

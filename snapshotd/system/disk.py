"""Room on the node's disks: what captures and fetches under way will need, and what is left for all else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dumont.errors import ResourceExhausted

# Kept free unless the operator says otherwise: journals, logs and whatever else lies on the disk.
RESERVE_PARTS = 50
LARGEST_RESERVE = 1 << 30


@dataclass(frozen=True)
class FileSystem:
    """One of them: which, and its bytes."""

    device: int
    total: int
    free: int

    @classmethod
    def of(cls, directory: Path) -> FileSystem:
        """The one that a directory is on."""
        usage = shutil.disk_usage(directory)
        return cls(directory.stat().st_dev, usage.total, usage.free)


@dataclass
class DiskReservations:
    """Bytes promised to jobs under way, on whatever file system they write.

    Args:
        kept: bytes that nobody is promised; None: a fiftieth of the file system, at most 1 GiB.
        file_system: finds that of a directory.
    """

    kept: int | None = None
    file_system: Callable[[Path], FileSystem] = FileSystem.of
    _promised: dict[str, tuple[int, int]] = field(default_factory=dict)

    def reserve(self, owner: str, directory: Path, needed: int) -> None:
        """Promise room below ``directory`` to ``owner`` until it is released.

        Raises:
            ResourceExhausted: DISK_FULL, there is not that much.
        """
        found = self.file_system(directory)
        kept = min(found.total // RESERVE_PARTS, LARGEST_RESERVE) if self.kept is None else self.kept
        others = sum(size for where, size in self._promised.values() if where == found.device)
        if needed > found.free - others - kept:
            raise ResourceExhausted(
                "DISK_FULL",
                f"about {needed} bytes are needed below {directory}, where {found.free} are free, {others} "
                f"of them promised to others and {kept} kept for all else; delete snapshots or give it more "
                "room",
                metadata={"needed": str(needed), "free": str(found.free), "directory": str(directory)},
            )
        self._promised[owner] = (found.device, needed)

    def release(self, owner: str) -> None:
        """``owner`` has written what it wrote; nothing happens if it was promised nothing."""
        self._promised.pop(owner, None)

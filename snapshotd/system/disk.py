"""Space on the node's disks: how much jobs under way have reserved, and how much is kept free."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dumont.errors import ResourceExhausted

# The part of a disk that is kept free for journals, logs and other uses, unless the operator sets a number.
RESERVE_PARTS = 50
LARGEST_RESERVE = 1 << 30
# The unit of ``st_blocks``, whatever the file system's own.
BLOCK = 512


@dataclass(frozen=True)
class FileSystem:
    """A file system, by its device number, and its size and free space in bytes."""

    device: int
    total: int
    free: int

    @classmethod
    def of(cls, directory: Path) -> FileSystem:
        """The file system of a directory."""
        usage = shutil.disk_usage(directory)
        return cls(directory.stat().st_dev, usage.total, usage.free)


@dataclass
class DiskReservations:
    """Disk space that is set aside for jobs under way, on the file systems that they write to.

    Args:
        kept: bytes that cannot be reserved; None for a fiftieth of the file system, at most 1 GiB.
        file_system: finds the file system of a directory.
    """

    kept: int | None = None
    file_system: Callable[[Path], FileSystem] = FileSystem.of
    _reserved: dict[str, tuple[int, int]] = field(default_factory=dict)

    def reserve(self, owner: str, directory: Path, needed: int) -> None:
        """Reserve bytes below ``directory`` for ``owner`` until it releases them, in place of what it had.

        Raises:
            ResourceExhausted: DISK_FULL, there is not enough space.
        """
        found, others, kept = self._measure(directory, owner)
        if needed > found.free - others - kept:
            raise ResourceExhausted(
                "DISK_FULL",
                f"about {needed} bytes are needed below {directory}, where {found.free} are free, of which "
                f"{others} are reserved by other jobs and {kept} are kept free; delete snapshots or use a "
                "larger disk",
                metadata={"needed": str(needed), "free": str(found.free), "directory": str(directory)},
            )
        self._reserved[owner] = (found.device, needed)

    def free(self, directory: Path) -> int:
        """Bytes below ``directory`` that can be reserved."""
        found, others, kept = self._measure(directory)
        return max(0, found.free - others - kept)

    def is_short(self, owner: str, directory: Path) -> bool:
        """Whether others have taken space reserved for ``owner``, who writes to ``directory``."""
        _, reserved = self._reserved.get(owner, (0, 0))
        with contextlib.suppress(OSError):  # the directory may be going away meanwhile
            written = sum(path.stat().st_blocks * BLOCK for path in directory.rglob("*"))
            return self.file_system(directory).free + written < reserved
        return False

    def _measure(self, directory: Path, owner: str = "") -> tuple[FileSystem, int, int]:
        """The file system, what others than ``owner`` have reserved on it, and what is kept free."""
        found = self.file_system(directory)
        kept = min(found.total // RESERVE_PARTS, LARGEST_RESERVE) if self.kept is None else self.kept
        others = sum(
            size
            for other, (where, size) in self._reserved.items()
            if where == found.device and other != owner
        )
        return found, others, kept

    def release(self, owner: str) -> None:
        """Give back what ``owner`` had reserved, if anything."""
        self._reserved.pop(owner, None)

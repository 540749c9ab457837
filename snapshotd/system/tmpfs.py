"""Memory of this node as a directory: a tmpfs that outlives the daemon, and that the next one finds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from snapshotd.system import linux

FLAGS = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC


@dataclass(frozen=True)
class Tmpfs:
    """One of them, mounted or not.

    Attributes:
        source: what the kernel calls its source; it tells whose mount it is.
        directory: where it is mounted; it exists.
    """

    source: str
    directory: Path

    def mount(self, options: str, wish: str) -> str:
        """Mount it.

        Args:
            wish: an option that is left out where the kernel does not know it.

        Returns:
            Why it was left out; empty: it was not.

        Raises:
            OSError: it cannot be mounted.
        """
        try:
            linux.mount(self.source, self.directory, "tmpfs", FLAGS, f"{options},{wish}")
        except OSError as error:
            linux.mount(self.source, self.directory, "tmpfs", FLAGS, options)
            return str(error)
        return ""

    def change(self, options: str) -> None:
        """Give it other options where it is mounted."""
        linux.mount(self.source, self.directory, "tmpfs", FLAGS | linux.MS_REMOUNT, options)

    def unmount(self) -> None:
        """Take it away, if it is there; what is mapped of it stays until nobody maps it any more."""
        if self.mounted():
            linux.unmount(self.directory)

    def used(self) -> int:
        """Bytes taken of it."""
        status = os.statvfs(self.directory)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def mounted(self) -> bool:
        wanted = os.path.realpath(self.directory)
        with Path("/proc/self/mountinfo").open(errors="replace") as lines:
            for line in lines:
                fields, _, details = line.partition(" - ")
                point = fields.split()[4].encode().decode("unicode_escape")
                if point == wanted and details.split()[:2] == ["tmpfs", self.source]:
                    return True
        return False

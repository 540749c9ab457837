"""A tmpfs that outlives the daemon and that the next daemon finds again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from snapshotd.system import linux

FLAGS = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC


@dataclass(frozen=True)
class Tmpfs:
    """A tmpfs, mounted or not.

    Attributes:
        source: the source in the kernel's list of mounts, which shows whose mount it is.
        directory: the mount point, which exists.
    """

    source: str
    directory: Path

    def mount(self, options: str, wish: str) -> str:
        """Mount the tmpfs.

        Args:
            wish: an option that is left out if the kernel refuses it.

        Returns:
            The reason for which ``wish`` was left out; empty if it was not.

        Raises:
            OSError: the tmpfs cannot be mounted.
        """
        try:
            linux.mount(self.source, self.directory, "tmpfs", FLAGS, f"{options},{wish}")
        except OSError as error:
            linux.mount(self.source, self.directory, "tmpfs", FLAGS, options)
            return str(error)
        return ""

    def change(self, options: str) -> None:
        """Change the mount options of the mounted tmpfs."""
        linux.mount(self.source, self.directory, "tmpfs", FLAGS | linux.MS_REMOUNT, options)

    def unmount(self) -> None:
        """Unmount the tmpfs if it is mounted. Files of it that are mapped stay until nobody maps them."""
        if self.mounted():
            linux.unmount(self.directory)

    def used(self) -> int:
        """Bytes that its files take."""
        status = os.statvfs(self.directory)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def mounted(self) -> bool:
        """Whether the kernel lists a tmpfs of this source at the mount point."""
        wanted = os.path.realpath(self.directory)
        with Path("/proc/self/mountinfo").open(errors="replace") as lines:
            for line in lines:
                fields, _, details = line.partition(" - ")
                point = fields.split()[4].encode().decode("unicode_escape")
                if point == wanted and details.split()[:2] == ["tmpfs", self.source]:
                    return True
        return False

"""Freeze a process tree: by cgroup v2, or by SIGSTOP where that cannot be used."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


def cgroup2_root() -> Path | None:
    """Where cgroup v2 is mounted, alone or beside v1; None if it is not."""
    with Path("/proc/self/mountinfo").open() as lines:
        for line in lines:
            fields, _, details = line.partition(" - ")
            if details.split()[0] == "cgroup2":
                return Path(fields.split()[4])
    return None


def remove_group(name: str) -> None:
    """Remove the cgroup of a process that has ended together with its shim, which would have removed it."""
    if (root := cgroup2_root()) is not None:
        Freezer(group_below(root, name), 0).remove()


def group_below(root: Path, name: str) -> Path:
    """The cgroup of the model host of the shim ``name``, in the hierarchy mounted at ``root``."""
    return root / "dumont" / name


def processes_in(group: Path) -> list[int]:
    """The pids in a cgroup; none where it does not exist."""
    try:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


@dataclass(frozen=True)
class Freezer:
    """Freezes one process tree.

    Attributes:
        group: the cgroup of the tree; None where cgroup v2 cannot be used.
        pid: the root of the tree. It is a child of this process, so the pid cannot have been reused.
    """

    group: Path | None
    pid: int

    @classmethod
    def create(cls, name: str, pid: int) -> Freezer:
        """Put ``pid`` into a cgroup of its own below ``dumont/``, where this machine allows it."""
        root = cgroup2_root()
        if root is None:
            return cls(None, pid)
        group = group_below(root, name)
        try:
            group.mkdir(parents=True, exist_ok=True)
            (group / "cgroup.procs").write_text(str(pid))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            return cls(None, pid)
        return cls(group, pid)

    def freeze(self) -> None:
        """Stop the tree from running; none of its processes ends."""
        if self.group is None:
            os.kill(self.pid, signal.SIGSTOP)
        else:
            (self.group / "cgroup.freeze").write_text("1")

    def thaw(self) -> None:
        """Let the tree run again."""
        if self.group is None:
            os.kill(self.pid, signal.SIGCONT)
        else:
            (self.group / "cgroup.freeze").write_text("0")

    def remove(self) -> None:
        """Remove the cgroup, once its processes are gone."""
        if self.group is not None:
            with contextlib.suppress(OSError):
                self.group.rmdir()

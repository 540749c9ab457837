"""Bound the memory of a process tree by a cgroup: beyond it the kernel ends that tree, and no other process.

With cgroup v2 the group is the one that the tree is frozen in; with v1 it is one of the memory hierarchy.
What a process had before it came into the group, as after a restore, is not counted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from snapshotd.system.freezer import cgroup2_root, group_below


@dataclass(frozen=True)
class MemoryLimit:
    """The limit of one process tree.

    Attributes:
        group: its cgroup; None where memory cannot be bound.
        bound: bytes that it may take; 0: no limit.
    """

    group: Path | None
    bound: int

    @classmethod
    def create(cls, name: str, pid: int, bound: int) -> MemoryLimit:
        """Bound what ``pid`` and its descendants take from now on, if this machine lets us."""
        if bound:
            for find, limit in ((_v2, "memory.max"), (_v1, "memory.limit_in_bytes")):
                group = find(name)
                if group is not None and _write(group, limit, bound) and _write(group, "cgroup.procs", pid):
                    # All of it at once: half a model host is of no use.
                    _write(group, "memory.oom.group", 1)
                    return cls(group, bound)
        return cls(None, 0)

    def exceeded(self) -> bool:
        """Whether the kernel ended something in it for want of memory."""
        if self.group is None:
            return False
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                counts = dict(line.split() for line in (self.group / name).read_text().splitlines())
                return int(counts.get("oom_kill", 0)) > 0
        return False

    def remove(self) -> None:
        """Remove the cgroup, once its processes are gone."""
        if self.group is not None:
            with contextlib.suppress(OSError):
                self.group.rmdir()


def remove_memory_group(name: str) -> None:
    """Remove what the shim of that name made, and could not remove itself."""
    if (root := memory_root()) is not None:
        MemoryLimit(group_below(root, name), 0).remove()


def _v2(name: str) -> Path | None:
    """The group of the freezer, with the memory controller switched on for it."""
    root = cgroup2_root()
    if root is None:
        return None
    group = group_below(root, name)
    for parent in (root, group.parent):
        _write(parent, "cgroup.subtree_control", "+memory")
    return group if (group / "memory.max").exists() else None


def _v1(name: str) -> Path | None:
    root = memory_root()
    if root is None:
        return None
    group = group_below(root, name)
    with contextlib.suppress(OSError):
        group.mkdir(parents=True, exist_ok=True)
    return group if group.is_dir() else None


def memory_root() -> Path | None:
    """Where the memory hierarchy of cgroup v1 is mounted; None if it is not."""
    with Path("/proc/self/mountinfo").open() as lines:
        for line in lines:
            fields, _, details = line.partition(" - ")
            kind, _, options = details.split()[:3]
            if kind == "cgroup" and "memory" in options.split(","):
                return Path(fields.split()[4])
    return None


def _write(group: Path, name: str, value: object) -> bool:
    try:
        (group / name).write_text(str(value))
    except OSError:
        return False
    return True

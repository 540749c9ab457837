"""Limit the memory of a process tree by a cgroup. If it needs more, the kernel ends that tree and no other.

With cgroup v2 this is the group in which the tree is frozen, with v1 a group of the memory hierarchy. Memory
that a process had before it entered the group, as after a restore, does not count.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from snapshotd.system.freezer import cgroup2_root, group_below


@dataclass(frozen=True)
class MemoryLimit:
    """The memory limit of one process tree.

    Attributes:
        group: its cgroup; None where memory cannot be limited.
        bound: bytes that it may take; 0 for no limit.
    """

    group: Path | None
    bound: int

    @classmethod
    def create(cls, name: str, pid: int, bound: int) -> MemoryLimit:
        """Limit the memory that ``pid`` and its descendants take from now on, where that is possible."""
        if bound:
            for find, limit in ((_v2, "memory.max"), (_v1, "memory.limit_in_bytes")):
                group = find(name)
                if group is not None and _write(group, limit, bound) and _write(group, "cgroup.procs", pid):
                    # The kernel ends the whole tree, because part of a model host is of no use.
                    _write(group, "memory.oom.group", 1)
                    return cls(group, bound)
        return cls(None, 0)

    def exceeded(self) -> bool:
        """Whether the kernel has ended a process of the tree because the limit was reached."""
        if self.group is None:
            return False
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                counts = dict(line.split() for line in (self.group / name).read_text().splitlines())
                return int(counts.get("oom_kill", 0)) > 0
        return False

    def remove(self) -> None:
        """Remove the cgroup, once its processes have ended."""
        if self.group is not None:
            with contextlib.suppress(OSError):
                self.group.rmdir()


def version() -> int:
    """The version of the cgroups that limit memory on this machine; 0 if there are none."""
    root = cgroup2_root()
    with contextlib.suppress(OSError):
        if root is not None and "memory" in (root / "cgroup.controllers").read_text().split():
            return 2
    return 1 if memory_root() is not None else 0


def remove_memory_group(name: str) -> None:
    """Remove the group that a shim has made, by the shim's name, and could not remove itself."""
    if (root := memory_root()) is not None:
        MemoryLimit(group_below(root, name), 0).remove()


def _v2(name: str) -> Path | None:
    """The group of the freezer, with the memory controller enabled."""
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

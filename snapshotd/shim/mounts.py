"""What a model host sees of the file system.

Its root is a private bind mount of the node's root, with a ``/proc`` of its own pid namespace (CUDA
needs that), the instance's directory at ``/run/dumont``, and the node's other real file systems where
they are. Kernel pseudo file systems other than ``/dev`` and ``/sys`` stay outside: CRIU could not put
them back. CRIU treats every mount but ``/`` and ``/proc`` as external: a name at dump, mapped to a path
of the restoring node at restore, so that a snapshot never says what is mounted.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from snapshotd.shim import linux

INSTANCE_MOUNT = "/run/dumont"
# The images that a model host was restored from: most of its memory is mapped from a file there.
MEMORY_MOUNT = "/run/dumont-memory"

PSEUDO = frozenset(
    {
        "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs",
        "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs",
        "selinuxfs", "tracefs",
    }
)  # fmt: skip
# Sockets and state of the node, and the pid namespace's own view.
HIDDEN = ("/run/", "/proc/")


def external_mounts(mountinfo: Iterable[str]) -> list[str]:
    """The mount points a model host gets besides ``/``, ``/proc`` and its instance directory.

    Args:
        mountinfo: lines of ``/proc/self/mountinfo``.

    Returns:
        Absolute paths, parents before children, each once. What lies below a pseudo file system or
        below ``/run`` (sockets and state of the node) is left out.
    """
    points: set[str] = set()
    for line in mountinfo:
        fields, _, details = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")
        kind = details.split()[0]
        if kind in PSEUDO or point == "/" or f"{point}/".startswith(HIDDEN) or point.startswith("/sys/"):
            continue
        points.add(point)
    return sorted(points)


def node_mounts() -> list[str]:
    """:func:`external_mounts` of this process's mount namespace."""
    with Path("/proc/self/mountinfo").open() as lines:
        return external_mounts(lines)


def bind_root(root: Path) -> None:
    """Bind the node's root file system, without what is mounted on it, at ``root``."""
    linux.mount("/", root, None, linux.MS_BIND)
    linux.mount("none", root, None, linux.MS_PRIVATE)


def enter_root(root: Path, instance_directory: Path, externals: Iterable[str]) -> None:
    """Make ``root`` the root of the calling process, in its own mount namespace and pid namespace."""
    for point in externals:
        linux.mount(point, root / point.lstrip("/"), None, linux.MS_BIND)
    for point in (INSTANCE_MOUNT, MEMORY_MOUNT):
        # One that is started has no images; what is mounted in their place is of no matter.
        linux.mount(str(instance_directory), root / point.lstrip("/"), None, linux.MS_BIND)
    linux.mount("proc", root / "proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    linux.pivot_root(root)

"""What a model host sees of the file system.

Its root is a private bind mount of the node's root, with a ``/proc`` of its own pid namespace (CUDA
needs that), the instance's directory at ``/run/dumont``, the node's weight cache, for reading, at
``/run/dumont-weights``, and the node's other real file systems where they are. Kernel pseudo file systems
other than ``/dev`` and ``/sys`` stay outside: CRIU could not put them back. CRIU treats every mount but ``/``
and ``/proc`` as external: a name at dump, mapped to a path of the restoring node at restore, so that a
snapshot never says what is mounted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from snapshotd.system import linux

INSTANCE_MOUNT = "/run/dumont"
# The images that a model host was restored from: most of its memory is mapped from a file there.
MEMORY_MOUNT = "/run/dumont-memory"
# The same on every node, wherever its state lies: a restored process maps its weights by this path.
WEIGHTS_MOUNT = "/run/dumont-weights"
# What the kernel calls the sources of the mounts that a node makes for itself: its weight cache, and the
# image files of encrypted snapshots while they are in use.
WEIGHTS_SOURCE = "dumont-weights"
UNSEALED_SOURCE = "dumont-unsealed"

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
        below ``/run`` (sockets and state of the node) is left out, and so is what nodes mount for themselves:
        a model host sees its own node's weight cache, and its own snapshot, under other names.
    """
    points: set[str] = set()
    for line in mountinfo:
        fields, _, details = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")
        kind, source = details.split()[:2]
        if (
            kind in PSEUDO
            or source in (WEIGHTS_SOURCE, UNSEALED_SOURCE)
            or point == "/"
            or f"{point}/".startswith(HIDDEN)
            or point.startswith("/sys/")
        ):
            continue
        points.add(point)
    return sorted(points)


def node_mounts() -> list[str]:
    """:func:`external_mounts` of this process's mount namespace."""
    with Path("/proc/self/mountinfo").open() as lines:
        return external_mounts(lines)


def identity(directory: Path) -> tuple[int, int]:
    """What tells this directory from any other, under whatever name; zeros where it cannot be reached."""
    try:
        status = directory.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def make_private() -> None:
    """A mount namespace of our own: what we mount goes with us and is never seen on the node.

    CRIU keeps what it finds out about the kernel in ``/run``, if that is a tmpfs; where it is not, every
    CRIU start would find it out anew (50 ms here), so ``/run`` becomes one, shared by all shims.
    """
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    with Path("/proc/self/mountinfo").open() as lines:
        tmpfs = {line.split()[4] for line in lines if " - tmpfs " in line}
    cache = Path("/dev/shm/dumont-criu")
    if "/run" not in tmpfs and "/dev/shm" in tmpfs:
        # Anybody may have put something else there first; then it takes the 50 ms.
        with contextlib.suppress(OSError):
            cache.mkdir(mode=0o700, exist_ok=True)
            if cache.stat().st_uid == os.getuid() and not cache.is_symlink():
                linux.mount(str(cache), "/run", None, linux.MS_BIND)


def bind_root(root: Path) -> None:
    """Bind the node's root file system, without what is mounted on it, at ``root``."""
    linux.mount("/", root, None, linux.MS_BIND)
    linux.mount("none", root, None, linux.MS_PRIVATE)


def make_read_only(directory: Path) -> None:
    """Bind a directory to itself, for reading only; whatever is bound from there is read-only as well."""
    linux.mount(str(directory), directory, None, linux.MS_BIND)
    flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("none", directory, None, linux.MS_REMOUNT | linux.MS_BIND | flags)


def enter_root(root: Path, places: Mapping[str, Path]) -> None:
    """Make ``root`` the root of the calling process, in its own mount namespace and pid namespace.

    Args:
        places: what the process sees besides, and where it is on the node; parents before children.
    """
    for point, place in places.items():
        linux.mount(str(place), root / point.lstrip("/"), None, linux.MS_BIND)
    # Where the node's mounts are shared, as systemd makes them, these would follow them, and CRIU would look
    # for what they follow when it restores.
    linux.mount("none", root, None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("proc", root / "proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    linux.pivot_root(root)

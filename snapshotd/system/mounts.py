"""The file systems that a model host sees.

Its root is a private bind mount of the node's root. In it are a ``/proc`` of its own pid namespace, which
CUDA needs, the instance's directory at ``/run/dumont``, the node's weight cache, read-only, at
``/run/dumont-weights``, the environment of its engine, if that has one, read-only at
``/run/dumont-engines/<engine>``, and the node's other real file systems at their own paths. The kernel's
pseudo file systems other than ``/dev`` and ``/sys`` are left out, because CRIU could not restore them. To
CRIU every mount but ``/`` and ``/proc`` is external: a name at dump, which is mapped to a path of the
restoring node at restore. So a snapshot never decides what is mounted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from snapshotd.system import linux

INSTANCE_MOUNT = "/run/dumont"
# The images that a model host was restored from. Most of its memory is mapped from a file there.
MEMORY_MOUNT = "/run/dumont-memory"
# A restored process maps its weights by this path, so it is the same on every node, wherever its state lies.
WEIGHTS_MOUNT = "/run/dumont-weights"
# Below it, the environments of engines that run under an interpreter of their own.
ENGINES_MOUNT = "/run/dumont-engines"
# The sources, in the kernel's list, of the mounts that a node makes for itself: its weight cache, and the
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
# Sockets and state of the node, and the view of its own pid namespace.
HIDDEN = ("/run/", "/proc/")


def external_mounts(mountinfo: Iterable[str]) -> list[str]:
    """The mount points that a model host gets besides ``/``, ``/proc`` and its instance directory.

    Args:
        mountinfo: lines of ``/proc/self/mountinfo``.

    Returns:
        Absolute paths, parents before children, each once. Mounts below a pseudo file system or below
        ``/run`` (sockets and state of the node) are left out. So are the mounts that a node makes for itself:
        a model host sees its node's weight cache and its own snapshot under other names.
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
    """Enter a mount namespace of our own, whose mounts end with this process and never show on the node.

    CRIU caches what it finds out about the kernel in ``/run`` if that is a tmpfs. Otherwise every start of
    CRIU would find it out anew, in 50 ms. So a directory in memory that all shims share is bound to ``/run``.
    """
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    with Path("/proc/self/mountinfo").open() as lines:
        tmpfs = {line.split()[4] for line in lines if " - tmpfs " in line}
    cache = Path("/dev/shm/dumont-criu")
    if "/run" not in tmpfs and "/dev/shm" in tmpfs:
        # Somebody may have put something else there first; then every start takes the 50 ms.
        with contextlib.suppress(OSError):
            cache.mkdir(mode=0o700, exist_ok=True)
            if cache.stat().st_uid == os.getuid() and not cache.is_symlink():
                linux.mount(str(cache), "/run", None, linux.MS_BIND)


def bind_root(root: Path) -> None:
    """Bind the node's root file system at ``root``, without the file systems mounted on it."""
    linux.mount("/", root, None, linux.MS_BIND)
    linux.mount("none", root, None, linux.MS_PRIVATE)


def engine_mount(engine: str) -> str:
    """Where a model host sees the environment of an engine."""
    return f"{ENGINES_MOUNT}/{engine}"


def make_read_only(directory: Path, programs: bool = False) -> None:
    """Bind a directory to itself, read-only. Directories that are bound from it are read-only as well.

    Args:
        programs: it holds some that may be run.
    """
    linux.mount(str(directory), directory, None, linux.MS_BIND)
    flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | (0 if programs else linux.MS_NOEXEC)
    linux.mount("none", directory, None, linux.MS_REMOUNT | linux.MS_BIND | flags)


def enter_root(root: Path, places: Mapping[str, Path]) -> None:
    """Make ``root`` the root of the calling process, in its own mount namespace and pid namespace.

    Args:
        places: further mount points and their directories on the node, parents before children.
    """
    for point, place in places.items():
        linux.mount(str(place), root / point.lstrip("/"), None, linux.MS_BIND)
    # Where the node's mounts are shared, as systemd makes them, these mounts would be their peers, and CRIU
    # would look for those peers when it restores.
    linux.mount("none", root, None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("proc", root / "proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    linux.pivot_root(root)

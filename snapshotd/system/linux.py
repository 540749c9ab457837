"""The system calls that Python 3.11 does not offer: namespaces and mounts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

CLONE_NEWNS = 0x0002_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x4_0000
MS_SLAVE = 0x8_0000

MNT_DETACH = 0x2
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Give the calling process new namespaces; a new pid namespace begins with its next child."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str | Path, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if text is None else str(text).encode() for text in (source, target, kind)]
    options = None if data is None else data.encode()
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), options), f"mount {source} on {target}")


def unmount(target: str | Path) -> None:
    """Take a mount and all below it out of sight; it ends when nobody uses it any more."""
    _check(_libc.umount2(str(target).encode(), MNT_DETACH), f"umount {target}")


def become_subreaper() -> None:
    """Orphaned descendants become children of the calling process, which can wait for them."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def end_with_parent(number: int) -> None:
    """Have the kernel send signal ``number`` when the parent dies; 0: no longer."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl")


def kill_children() -> None:
    """End every child of the calling process, and wait for it. With a pid namespace's first all in it end."""
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(int(pid), 0)


def anonymous_memory(pid: int) -> int:
    """Bytes of memory that a process has written to and that belong to no file; 0: it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def pivot_root(root: Path) -> None:
    """Make ``root``, a mount point, the root of this mount namespace and let go of the old one."""
    os.chdir(root)
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    # The old root now lies on top of the new one; without it "/" is the new one alone.
    unmount(".")
    os.chdir("/")


_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

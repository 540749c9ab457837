"""System calls that Python 3.11 does not offer, for namespaces, mounts and child processes."""

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
    """Move the calling process into new namespaces. A new pid namespace begins with its next child."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str | Path, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount ``source`` at ``target``, as mount(2) does.

    Raises:
        OSError: the kernel refused.
    """
    arguments = [None if text is None else str(text).encode() for text in (source, target, kind)]
    options = None if data is None else data.encode()
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), options), f"mount {source} on {target}")


def unmount(target: str | Path) -> None:
    """Detach a mount and all mounts below it. The kernel ends them once nobody uses them."""
    _check(_libc.umount2(str(target).encode(), MNT_DETACH), f"umount {target}")


def become_subreaper() -> None:
    """Make orphaned descendants children of the calling process, so that it can wait for them."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def end_with_parent(number: int) -> None:
    """Have the kernel send signal ``number`` to this process when its parent dies; 0 cancels that."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl")


def kill_children() -> None:
    """Kill every child of the calling process and wait for it.

    A pid namespace ends with its first process, so killing that one kills all processes in it.
    """
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(int(pid), 0)


def anonymous_memory(pid: int) -> int:
    """Bytes of memory of a process that it has written to and that no file backs; 0 if it has ended."""
    return _resident(pid, "RssAnon:")


def own_memory(pid: int) -> int:
    """Bytes of resident memory of a process outside shared memory and tmpfs; 0 if it has ended."""
    return _resident(pid, "RssAnon:", "RssFile:")


def _resident(pid: int, *kinds: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text() if pid else ""
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines() if line.startswith(kinds))
    return sum(int(words[1]) for words in lines) * 1024


def pivot_root(root: Path) -> None:
    """Make ``root``, a mount point, the root of this mount namespace, and detach the old root."""
    os.chdir(root)
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    # The old root now lies on top of the new one. Without it, "/" is the new root alone.
    unmount(".")
    os.chdir("/")


_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

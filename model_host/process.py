"""What this process holds, as the kernel sees it."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

CONTROL_IN: Final = 3
CONTROL_OUT: Final = 4
EXPECTED: Final = frozenset(range(5))
# Exit status of a process that could use its device no more, and the seconds until it ends.
GAVE_UP: Final = 70
GIVE_UP_SECONDS: Final = 0.5


def open_descriptors() -> dict[int, str]:
    """Every open descriptor and what it leads to."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor that listed this folder
    return found


def is_gpu_drivers(leads_to: str) -> bool:
    """Whether a descriptor is the CUDA driver's: it opens them as it goes and closes them at a checkpoint."""
    return leads_to.startswith("/dev/nvidia") or leads_to == "anon_inode:[eventfd]"


def wait_for_descriptors(allowed: Callable[[int, str], bool], timeout: float = 2.0) -> dict[int, str]:
    """The descriptors not ``allowed`` that are still open after at most ``timeout`` seconds.

    gRPC closes its last ones on threads of its own, a moment after its server has stopped.
    """
    end = time.monotonic() + timeout
    while True:
        extra = {number: to for number, to in open_descriptors().items() if not allowed(number, to)}
        if not extra or time.monotonic() >= end:
            return extra
        time.sleep(0.001)


def give_up() -> None:
    """End the process in a moment, for callers to hear why; it does not wait for anything that may hang."""
    threading.Timer(GIVE_UP_SECONDS, os._exit, [GAVE_UP]).start()


def release_memory() -> None:
    """Give back to the kernel what is free: every page kept would be written to the snapshot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # a libc without it
        return


def memory() -> dict[str, int]:
    """Bytes resident, by kind: ``anonymous`` is what a snapshot must carry, ``file`` what it need not."""
    wanted = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in wanted:
            found[wanted[key]] = int(value.split()[0]) * 1024
    return found

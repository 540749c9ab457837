"""How this process asks the kernel for memory."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
M_MMAP_THRESHOLD = -3
LARGE = 256 << 10


def give_back_large_blocks() -> None:
    """Have blocks from 256 KiB on go back to the kernel when they are freed, where malloc is glibc's.

    By itself glibc raises that limit up to 32 MiB as it sees large blocks freed, and then keeps those of
    8 MiB in the arenas of each thread: after an upload by 16 threads some 200 MiB that nobody used.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)

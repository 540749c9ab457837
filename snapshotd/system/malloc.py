"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
M_MMAP_THRESHOLD = -3
LARGE = 256 << 10


def give_back_large_blocks() -> None:
    """Make glibc return blocks of 256 KiB and more to the kernel when they are freed.

    On its own, glibc raises this threshold up to 32 MiB as it sees large blocks freed, and keeps freed blocks
    of 8 MiB in the arenas of each thread: some 200 unused MiB after an upload by 16 threads. With another C
    library this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)

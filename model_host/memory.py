"""This process's own memory: where it lies, and which of it nobody would miss."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

# Smaller ranges are the allocator's or threads' stacks (8 MiB), and in use; what a CUDA checkpoint makes is a
# few hundred MiB in one piece.
SMALLEST: Final = 32 << 20
# What one thread looks at before it takes more: enough that the interpreter's lock does not matter.
PART: Final = 8 << 20
WORDS: Final = mmap.PAGESIZE // 8
# More do not make it faster: memory is the limit.
MOST_THREADS: Final = 8

Range = tuple[int, int]
_libc = ctypes.CDLL(None)


def ranges() -> list[Range]:
    """Address ranges of writable private memory that belongs to no file, ascending."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
        if permissions.startswith("rw-p") and not name:
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def drop_zero_pages(known: Sequence[Range]) -> int:
    """Give the zero pages of large ranges that are not ``known`` back to the kernel: they stay zero.

    Nothing else may write to them meanwhile.

    Returns:
        How many bytes those were.
    """
    large = _large(beyond(_large(ranges()), known))
    parts = [(at, min(at + PART, end)) for start, end in large for at in range(start, end, PART)]
    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        return sum(pool.map(_drop, parts))


def _large(found: Iterable[Range]) -> list[Range]:
    return [(start, end) for start, end in found if end - start >= SMALLEST]


def _drop(part: Range) -> int:
    dropped = 0
    for first, last in _zero_runs(*part):
        if _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED) == 0:
            dropped += last - first
    return dropped


def beyond(found: Iterable[Range], known: Sequence[Range]) -> Iterator[Range]:
    """The parts of ``found`` that are in no range of ``known``; both ascend."""
    for start, end in found:
        for low, high in known:
            if high <= start or low >= end:
                continue
            if low > start:
                yield start, low
            start = max(start, high)
        if start < end:
            yield start, end


def _zero_runs(start: int, end: int) -> Iterator[Range]:
    import numpy as np

    words = np.ctypeslib.as_array((ctypes.c_uint64 * ((end - start) // 8)).from_address(start))
    # The largest word of each page, because unlike any() it is vectorized.
    zero = np.concatenate(([0], words.reshape(-1, WORDS).max(axis=1) == 0, [0]))
    edges = np.flatnonzero(np.diff(zero))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield start + first * mmap.PAGESIZE, start + last * mmap.PAGESIZE

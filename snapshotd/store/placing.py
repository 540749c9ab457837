"""Put chunks in their places in files.

The kernel lets one thread at a time write to a file, which bounds what many cores can fetch. On a file system
in memory that gives huge pages a chunk is therefore unpacked into a mapping of its place: nobody waits for a
turn there, the bytes are not copied again, and a page that is mapped and zeroed for it is 2 MiB large. With
pages of 4 KiB that costs more than writing does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from snapshotd.store.model import Piece

HUGE_PAGE = 2 << 20

# Unpacks a chunk into the memory it is given, which has its size, or into its own; returns where it did.
Unpack = Callable[[memoryview | None], memoryview]


def place(folder: Path, pieces: Sequence[Piece], unpack: Unpack) -> None:
    """Put the parts of a chunk in their places, in files that exist at their sizes.

    Args:
        unpack: called once; what it raises leaves those places with anything.

    Raises:
        OSError: they cannot be written, for want of room (``ENOSPC``, ``EDQUOT``) or else.
    """
    first = pieces[0]
    if len(pieces) == 1 and first.size == first.chunk_size and first.offset % mmap.ALLOCATIONGRANULARITY == 0:
        with _opened(folder / first.file) as descriptor:
            # How a tmpfs says that it gives huge pages.
            if os.fstat(descriptor).st_blksize >= HUGE_PAGE:
                _unpack_into(descriptor, first, unpack)
                return
    plain = unpack(None)
    for piece in pieces:
        with _opened(folder / piece.file) as descriptor:
            _write(descriptor, plain[piece.start : piece.start + piece.size], piece.offset)


def _unpack_into(descriptor: int, piece: Piece, unpack: Unpack) -> None:
    # A page that cannot be had is an error here; when it is touched, it would be the end of the daemon.
    os.posix_fallocate(descriptor, piece.offset, piece.size)
    mapping = mmap.mmap(descriptor, piece.size, offset=piece.offset)
    try:
        unpack(memoryview(mapping))
    finally:
        # Whoever handles an error may still hold a part of it, and it goes with that.
        with contextlib.suppress(BufferError):
            mapping.close()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, plain: memoryview, offset: int) -> None:
    while plain:
        written = os.pwrite(descriptor, plain, offset)
        plain, offset = plain[written:], offset + written

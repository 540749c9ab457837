"""Put chunks in their places in files.

The kernel lets one thread at a time write to a file, which bounds what many cores can fetch. On a file system
in memory a chunk is therefore unpacked into a mapping of its place: turns are only for making room there, and
the bytes are not copied again. Each page is mapped and zeroed for it first, which is little where pages have
2 MiB, and with pages of 4 KiB costs more than writing does, so that few cores write.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from snapshotd.repository.model import Piece

HUGE_PAGE = 2 << 20
# So many threads wait longer for their turn to write than they need to map small pages.
MANY = 6

# Unpacks a chunk into the memory it is given, which has its size, or elsewhere; returns where it did.
Unpack = Callable[[memoryview | None], memoryview]


class ChunkWriter:
    """The places of chunks in the files of a directory, which exist at their sizes.

    Args:
        threads: that put chunks there at once.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._many = threads >= MANY
        self._in_memory = _in_memory(folder.stat().st_dev)

    def fill(self, pieces: Sequence[Piece], unpack: Unpack) -> None:
        """Put the parts of a chunk in their places.

        Args:
            unpack: called once; what it raises leaves those places with anything.

        Raises:
            OSError: they cannot be written, for want of room (``ENOSPC``, ``EDQUOT``) or else.
        """
        first = pieces[0]
        whole = len(pieces) == 1 and first.size == first.chunk_size
        if self._in_memory and whole and first.offset % mmap.ALLOCATIONGRANULARITY == 0:
            with self._opened(first) as descriptor:
                # A tmpfs tells that a file has huge pages with the size of its blocks.
                pays = self._many or os.fstat(descriptor).st_blksize >= HUGE_PAGE
                if pays and _unpack_into(descriptor, first, unpack):
                    return
        plain = unpack(None)
        for piece in pieces:
            with self._opened(piece) as descriptor:
                _write(descriptor, plain[piece.start : piece.start + piece.size], piece.offset)

    @contextlib.contextmanager
    def _opened(self, piece: Piece) -> Iterator[int]:
        descriptor = os.open(self._folder / piece.file, os.O_RDWR | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _in_memory(device: int) -> bool:
    """Whether it is a tmpfs. Room on a disk may have to be found again when a mapped page is written back."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with Path("/proc/self/mountinfo").open(errors="replace") as lines:
        return any(line.split()[2] == number and " - tmpfs " in line for line in lines)


def _unpack_into(descriptor: int, piece: Piece, unpack: Unpack) -> bool:
    """Unpack a chunk into its place; False where that cannot be mapped, and nothing was done."""
    try:
        # A page that cannot be had is an error here; when it is touched, it would be the end of the daemon.
        os.posix_fallocate(descriptor, piece.offset, piece.size)
        mapping = mmap.mmap(descriptor, piece.size, offset=piece.offset)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    try:
        plain = unpack(memoryview(mapping))
        # What was stored as it is stays where it was read; a copy here would hold the interpreter's lock.
        if plain.obj is not mapping:
            _write(descriptor, plain, piece.offset)
        del plain
    except BaseException as error:
        # An error is kept for long by whoever hands it on, with the frames that hold parts of the mapping,
        # which would keep all of the file in memory after it is removed.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        mapping.close()
    return True


def _write(descriptor: int, plain: memoryview, offset: int) -> None:
    while plain:
        written = os.pwrite(descriptor, plain, offset)
        plain, offset = plain[written:], offset + written

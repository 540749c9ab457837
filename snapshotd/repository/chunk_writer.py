"""Write the parts of chunks to their places in files.

The kernel lets one thread at a time write to a file, which limits how fast many cores can fetch. On a file
system in memory, a chunk is therefore unpacked into a mapping of its place. Threads then take turns only to
allocate, and the bytes are not copied again. Each page is first mapped and zeroed, which costs little with
pages of 2 MiB. With pages of 4 KiB it costs more than writing, so few cores write instead.
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
# With this many threads, waiting for a turn to write takes longer than mapping small pages.
MANY = 6

# Unpacks a chunk, into the given memory of its size or elsewhere, and returns where.
Unpack = Callable[[memoryview | None], memoryview]


class ChunkWriter:
    """Writes chunks into the files of a directory, which exist at their full sizes.

    Args:
        threads: threads that write at the same time.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._many = threads >= MANY
        self._in_memory = _in_memory(folder.stat().st_dev)

    def fill(self, pieces: Sequence[Piece], unpack: Unpack) -> None:
        """Write the parts of a chunk to their places.

        Args:
            unpack: called once. If it raises, the places may contain anything.

        Raises:
            OSError: they cannot be written, for example for lack of space (``ENOSPC``, ``EDQUOT``).
        """
        first = pieces[0]
        whole = len(pieces) == 1 and first.size == first.chunk_size
        if self._in_memory and whole and first.offset % mmap.ALLOCATIONGRANULARITY == 0:
            with self._opened(first) as descriptor:
                # The block size of a file on a tmpfs shows whether it has huge pages.
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
    """Whether a device is a tmpfs. On a disk, writing a mapped page back may need space again."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with Path("/proc/self/mountinfo").open(errors="replace") as lines:
        return any(line.split()[2] == number and " - tmpfs " in line for line in lines)


def _unpack_into(descriptor: int, piece: Piece, unpack: Unpack) -> bool:
    """Unpack a chunk into a mapping of its place; False if that cannot be mapped, and nothing was done."""
    try:
        # A lack of space is an error here. When the mapped page is touched, it would kill the daemon.
        os.posix_fallocate(descriptor, piece.offset, piece.size)
        mapping = mmap.mmap(descriptor, piece.size, offset=piece.offset)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    try:
        plain = unpack(memoryview(mapping))
        # An uncompressed chunk stays where it was read; copying it here would hold the interpreter's lock.
        if plain.obj is not mapping:
            _write(descriptor, plain, piece.offset)
        del plain
    except BaseException as error:
        # Whoever passes the error on keeps its frames, which refer to the mapping and would keep the whole
        # file in memory after it has been removed.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        mapping.close()
    return True


def _write(descriptor: int, plain: memoryview, offset: int) -> None:
    while plain:
        written = os.pwrite(descriptor, plain, offset)
        plain, offset = plain[written:], offset + written

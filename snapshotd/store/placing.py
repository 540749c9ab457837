"""Put the parts of chunks in their places in files, from several threads at once.

The kernel lets one thread at a time write to a file, however many cores there are. A mapping of the file
takes no turns, but each of its pages is zeroed and mapped first, which costs a core twice as much as writing.
So one thread writes, another waits to follow it without a gap, and who comes meanwhile copies through a
mapping: on few cores nobody does, and on many the file fills beside the one who writes.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from snapshotd.store.model import Piece

# One that writes, and the one that follows it.
QUEUE = 2
# Bytes that are copied through a mapping at once: they stay in a core's cache meanwhile.
STEP = 512 << 10


class Places:
    """The places of chunks in the files of a directory, which exist at their sizes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._queue = threading.BoundedSemaphore(QUEUE)
        # Two threads that write one file wait for each other in the kernel, which costs more than here.
        self._writing = threading.Lock()

    def fill(self, pieces: Sequence[Piece], plain: memoryview) -> None:
        """Put the parts of a chunk in their places.

        Raises:
            OSError: they cannot be written, for want of room (``ENOSPC``, ``EDQUOT``) or else.
        """
        queued = self._queue.acquire(blocking=False)
        try:
            for piece in pieces:
                part = plain[piece.start : piece.start + piece.size]
                descriptor = os.open(self._folder / piece.file, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    copied = 0 if queued else copy(descriptor, part, piece.offset)
                    if copied < piece.size:
                        with self._writing:
                            write(descriptor, part[copied:], piece.offset + copied)
                finally:
                    os.close(descriptor)
        finally:
            if queued:
                self._queue.release()


def write(descriptor: int, plain: memoryview, offset: int) -> None:
    """Write all bytes at ``offset`` in the file."""
    while plain:
        written = os.pwrite(descriptor, plain, offset)
        plain, offset = plain[written:], offset + written


def copy(descriptor: int, plain: memoryview, offset: int) -> int:
    """Copy bytes into a mapping of a file that reaches as far, beside others that do or that write.

    The kernel copies them, from a file in memory. Where it can make no page for them it tells the call, and
    would end the daemon by a signal if the daemon's own code touched that page. Neither call holds the
    interpreter's lock.

    Args:
        descriptor: of the file, to read and write.
        offset: in the file, in bytes.

    Returns:
        How many bytes are in place; fewer than there are: who writes the next ones will hear why.
    """
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    done = 0
    try:
        with (
            os.fdopen(os.memfd_create("chunk"), "r+b", buffering=0) as source,
            mmap.mmap(descriptor, offset - start + len(plain), offset=start) as mapping,
            memoryview(mapping) as mapped,
            mapped[offset - start :] as place,
        ):
            while done < len(plain):
                brought = os.pwrite(source.fileno(), plain[done : done + STEP], 0)
                with place[done : done + brought] as into:
                    done += os.preadv(source.fileno(), [into], 0)
    except (OSError, ValueError):
        # The latter from a mapping beyond the end of the file.
        pass
    return done

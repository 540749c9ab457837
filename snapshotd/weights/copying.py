"""Copy a file into memory and hash it, reading it once."""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

# Bytes that each thread maps at a time; mapped bytes count as memory of this process.
PIECE = 8 << 20


def copy(source: Path, target: Path, threads: int) -> str:
    """Copy ``source`` to the new file ``target``, which should be on a tmpfs.

    Args:
        threads: threads that copy; hashing uses all cores in addition.

    Returns:
        BLAKE3 of the content of ``target``, in hex.

    Raises:
        OSError: ``source`` cannot be read or was cut short, or there is no space; ``target`` is incomplete.
    """
    hasher = blake3(max_threads=blake3.AUTO)
    with source.open("rb", buffering=0) as read, target.open("xb+", buffering=0) as written:
        size = os.fstat(read.fileno()).st_size
        # Allocated before anything is mapped: a lack of memory for a mapped page would kill this process.
        os.posix_fallocate(written.fileno(), 0, size)

        def copy_piece(start: int) -> slice:
            length = min(PIECE, size - start)
            with mmap.mmap(written.fileno(), length, offset=start) as window, memoryview(window) as view:
                done = 0
                while done < length:
                    got = os.preadv(read.fileno(), [view[done:]], start + done)
                    if not got:
                        raise OSError(errno.EIO, "it became shorter while it was read", str(source))
                    done += got
            return slice(start, start + length)

        with ThreadPoolExecutor(threads) as pool:
            for piece in pool.map(copy_piece, range(0, size, PIECE)):
                length = piece.stop - piece.start
                with mmap.mmap(written.fileno(), length, prot=mmap.PROT_READ, offset=piece.start) as window:
                    hasher.update(window)
    return hasher.hexdigest()

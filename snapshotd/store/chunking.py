"""Image files to runs of chunks and holes. A chunk is named by what it holds, so it is stored once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from dumont.errors import DataLoss
from snapshotd.store.model import CHUNK, PublishedFile, Run

_ZEROS = bytes(CHUNK)


def pieces_of(size: int) -> int:
    """How many chunks and holes a file of ``size`` bytes has."""
    return -(-size // CHUNK)


def read_piece(path: Path, index: int, size: int) -> bytes | None:
    """The plain bytes of a file's piece; None when they are all zero.

    Args:
        size: of the whole file, in bytes.

    Raises:
        DataLoss: the file is shorter.
    """
    expected = min(CHUNK, size - index * CHUNK)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        data = os.pread(descriptor, expected, index * CHUNK)
        while len(data) < expected:
            more = os.pread(descriptor, expected - len(data), index * CHUNK + len(data))
            if not more:
                raise DataLoss(
                    "IMAGE_DAMAGED",
                    f"{path.name} ended before its {size} bytes were read",
                    metadata={"file": path.name},
                )
            data += more
    finally:
        os.close(descriptor)
    return None if data == _ZEROS[:expected] else data


def write_piece(path: Path, offset: int, data: bytes) -> None:
    """Put plain bytes in their place in a file that exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    finally:
        os.close(descriptor)


def name_chunk(plain: bytes, name_key: bytes | None) -> str:
    """BLAKE3 of the plain bytes, in hex; keyed where a name must not tell what the chunk holds."""
    return (blake3(plain) if name_key is None else blake3(plain, key=name_key)).hexdigest()


def join_pieces(name: str, size: int, chunks: Sequence[str | None]) -> PublishedFile:
    """A file from the names of its pieces in order, None for holes."""
    return PublishedFile(name, size, tuple(_runs(chunks)))


def _runs(chunks: Sequence[str | None]) -> Iterator[Run]:
    start = 0
    while start < len(chunks):
        hole = chunks[start] is None
        end = start
        while end < len(chunks) and (chunks[end] is None) == hole:
            end += 1
        yield Run(end - start, tuple(chunk for chunk in chunks[start:end] if chunk is not None))
        start = end

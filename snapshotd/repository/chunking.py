"""Cut image files into chunks. A chunk is named by its content, so that equal chunks are stored once.

A large file is cut into several chunks. Small files, of which CRIU writes some twenty, share chunks, because
each chunk is a request to the store, which takes as long as the bytes of many small files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from dumont.errors import DataLoss
from snapshotd.model import ImageFile
from snapshotd.repository.model import CHUNK, Extent, PublishedFile

# Files of fewer bytes share chunks.
SMALL = 64 << 10

_ZEROS = bytes(CHUNK)


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    file: str
    offset: int
    size: int


# The content of a chunk: spans, one after the other.
Content = tuple[Span, ...]


def size_of(content: Content) -> int:
    """Bytes of a chunk's content."""
    return sum(span.size for span in content)


def cut(files: Iterable[ImageFile]) -> Iterator[Content]:
    """Cut files into the contents of chunks, which cover every byte once."""
    small: list[Span] = []
    for file in files:
        if file.size >= SMALL:
            for offset in range(0, file.size, CHUNK):
                yield (Span(file.name, offset, min(CHUNK, file.size - offset)),)
        elif file.size:
            if size_of(tuple(small)) + file.size > CHUNK:
                yield tuple(small)
                small = []
            small.append(Span(file.name, 0, file.size))
    if small:
        yield tuple(small)


def read(folder: Path, content: Content) -> bytearray | None:
    """The plain bytes of a chunk; None if they are all zero.

    Raises:
        DataLoss: IMAGE_DAMAGED, a file is too short.
    """
    plain = bytearray(size_of(content))
    into, start = memoryview(plain), 0
    for span in content:
        _read_span(folder / span.file, span, into[start : start + span.size])
        start += span.size
    return None if _ZEROS.startswith(plain) else plain


def name_chunk(plain: bytes | bytearray | memoryview, name_key: bytes | None) -> str:
    """BLAKE3 of the plain bytes, in hex, with a key if the name must not reveal the content."""
    return (blake3(plain) if name_key is None else blake3(plain, key=name_key)).hexdigest()


def join(files: Iterable[ImageFile], chunks: Mapping[Content, str | None]) -> tuple[PublishedFile, ...]:
    """The files as extents of chunks.

    Args:
        chunks: the chunk of each content; None for zeros.
    """
    found: dict[str, dict[int, Extent]] = {file.name: {} for file in files}
    for content, chunk in chunks.items():
        start = 0
        for span in content:
            extent = Extent(span.size, chunk, start, size_of(content)) if chunk else Extent(span.size)
            found[span.file][span.offset] = extent
            start += span.size
    return tuple(
        PublishedFile(name, tuple(_merge_holes(extent for _, extent in sorted(extents.items()))))
        for name, extents in found.items()
    )


def _merge_holes(extents: Iterable[Extent]) -> Iterator[Extent]:
    hole = 0
    for extent in extents:
        if extent.chunk:
            if hole:
                yield Extent(hole)
                hole = 0
            yield extent
        else:
            hole += extent.size
    if hole:
        yield Extent(hole)


def _read_span(path: Path, span: Span, into: memoryview) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        done = 0
        while done < span.size:
            count = os.preadv(descriptor, [into[done:]], span.offset + done)
            if not count:
                raise DataLoss(
                    "IMAGE_DAMAGED",
                    f"{span.file} ended before its bytes to {span.offset + span.size} were read",
                    metadata={"file": span.file},
                )
            done += count
    finally:
        os.close(descriptor)

"""Image files to chunks. A chunk is named by what it holds, so it is stored once.

A large file is cut into chunks, and the small ones, of which CRIU writes some twenty, share chunks: each
chunk is a request to the store, and a request costs as much as the bytes of many small files.
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


# What a chunk will hold: spans, one behind the other.
Content = tuple[Span, ...]


def size_of(content: Content) -> int:
    return sum(span.size for span in content)


def cut(files: Iterable[ImageFile]) -> Iterator[Content]:
    """Every byte of the files, once, as what chunks may hold."""
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
    """The plain bytes of a chunk; None when they are all zero.

    Raises:
        DataLoss: a file is shorter.
    """
    plain = bytearray(size_of(content))
    into, start = memoryview(plain), 0
    for span in content:
        _read_span(folder / span.file, span, into[start : start + span.size])
        start += span.size
    return None if _ZEROS.startswith(plain) else plain


def name_chunk(plain: bytes | bytearray | memoryview, name_key: bytes | None) -> str:
    """BLAKE3 of the plain bytes, in hex; keyed where a name must not tell what the chunk holds."""
    return (blake3(plain) if name_key is None else blake3(plain, key=name_key)).hexdigest()


def join(files: Iterable[ImageFile], chunks: Mapping[Content, str | None]) -> tuple[PublishedFile, ...]:
    """The files as extents of the chunks that their content went into, None for zeros."""
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

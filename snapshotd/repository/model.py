"""The facts of the store: objects, published snapshots, and what garbage collection would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from snapshotd.model import Manifest

# Plain bytes of the largest chunk.
CHUNK = 8 << 20


@dataclass(frozen=True)
class ObjectInfo:
    """An object's key, its size in bytes and when it was last written."""

    key: str
    size: int
    modified: datetime


@dataclass(frozen=True)
class Extent:
    """Consecutive bytes of a file: a part of a chunk, or a hole of zeros.

    Attributes:
        size: in bytes.
        chunk: its name; empty: a hole.
        start: where in the chunk's plain bytes the part begins.
        chunk_size: plain bytes of the whole chunk.
    """

    size: int
    chunk: str = ""
    start: int = 0
    chunk_size: int = 0


@dataclass(frozen=True)
class Piece:
    """Where a part of a chunk belongs: so many bytes from ``start`` in it, at ``offset`` in a file."""

    file: str
    offset: int
    size: int
    chunk: str
    start: int
    chunk_size: int


@dataclass(frozen=True)
class PublishedFile:
    """An image file as its extents, in order."""

    name: str
    extents: tuple[Extent, ...]

    @property
    def size(self) -> int:
        return sum(extent.size for extent in self.extents)

    def pieces(self) -> Iterator[Piece]:
        """Where each part of a chunk belongs; holes are left out."""
        offset = 0
        for extent in self.extents:
            if extent.chunk:
                yield Piece(self.name, offset, extent.size, extent.chunk, extent.start, extent.chunk_size)
            offset += extent.size


@dataclass(frozen=True)
class SealedKey:
    """A data key, wrapped: only the holder of the wrapping key ``key_id`` can open it."""

    key_id: str
    wrapped: bytes


@dataclass(frozen=True)
class PublishedSnapshot:
    """A snapshot in the store, its signature verified.

    Attributes:
        digest: BLAKE3 of the signed document, in hex; what a controller remembers.
        signer: id of the key that signed it.
        key: the sealed data key; None: not encrypted.
    """

    manifest: Manifest
    files: tuple[PublishedFile, ...]
    digest: str
    signer: str
    key: SealedKey | None = None

    @property
    def encrypted(self) -> bool:
        return self.key is not None

    @property
    def size(self) -> int:
        """Plain bytes of all files, holes included."""
        return sum(file.size for file in self.files)

    @property
    def data_size(self) -> int:
        """Plain bytes of all files without their holes: what a fetch writes."""
        return sum(piece.size for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        for file in self.files:
            yield from file.pieces()

    def chunks(self) -> frozenset[str]:
        return frozenset(piece.chunk for piece in self.pieces())


@dataclass(frozen=True)
class Usage:
    """What a published snapshot takes, in bytes.

    Attributes:
        image_bytes: of its files, holes included.
        data_bytes: of its files without holes.
        stored_bytes: of its chunks as they lie in the store, each counted once.
        unique_bytes: of those, what no other snapshot uses: freed when this one is deleted.
    """

    image_bytes: int
    data_bytes: int
    stored_bytes: int
    unique_bytes: int
    chunks: int


@dataclass(frozen=True)
class PrunePlan:
    """What garbage collection would delete.

    Attributes:
        garbage: chunks that no snapshot names, what is said of them, and leftovers of killed writers, all
            older than the grace.
        tombstones: records of deletions that are older than the grace.
        kept_bytes: stored bytes of everything else under ``chunks/``.
        cutoff: what was written after this is kept, whoever needs it.
    """

    garbage: tuple[ObjectInfo, ...]
    tombstones: tuple[ObjectInfo, ...]
    kept_bytes: int
    cutoff: datetime

    @property
    def garbage_bytes(self) -> int:
        return sum(item.size for item in self.garbage)


@dataclass(frozen=True)
class PruneResult:
    """What garbage collection deleted; ``spared`` objects had come into use since the plan."""

    deleted: int
    deleted_bytes: int
    spared: int

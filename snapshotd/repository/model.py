"""The facts of a repository: objects, published snapshots, and what a prune deletes."""

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
    """Consecutive bytes of a file: a part of a chunk, or a hole, which reads as zeros.

    Attributes:
        size: in bytes.
        chunk: the chunk's name; empty for a hole.
        start: where the part begins in the plain bytes of the chunk.
        chunk_size: plain bytes of the whole chunk.
    """

    size: int
    chunk: str = ""
    start: int = 0
    chunk_size: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of a chunk and its place: ``size`` bytes from ``start`` in it, at ``offset`` in a file."""

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
        """Bytes of the file, including holes."""
        return sum(extent.size for extent in self.extents)

    def pieces(self) -> Iterator[Piece]:
        """The parts of chunks that the file consists of, without its holes."""
        offset = 0
        for extent in self.extents:
            if extent.chunk:
                yield Piece(self.name, offset, extent.size, extent.chunk, extent.start, extent.chunk_size)
            offset += extent.size


@dataclass(frozen=True)
class WrappedKey:
    """A data key that is encrypted with the wrapping key ``key_id``, whose holder alone can unwrap it."""

    key_id: str
    wrapped: bytes


@dataclass(frozen=True)
class PublishedSnapshot:
    """A snapshot in the repository, whose signature has been verified.

    Attributes:
        digest: BLAKE3 of the signed document, in hex. A controller remembers it.
        signer: id of the key that signed the document.
        key: the wrapped data key; None if the snapshot is not encrypted.
    """

    manifest: Manifest
    files: tuple[PublishedFile, ...]
    digest: str
    signer: str
    key: WrappedKey | None = None

    @property
    def encrypted(self) -> bool:
        """Whether the chunks are encrypted."""
        return self.key is not None

    @property
    def size(self) -> int:
        """Plain bytes of all files, holes included."""
        return sum(file.size for file in self.files)

    @property
    def data_size(self) -> int:
        """Plain bytes of all files without their holes, which a fetch writes."""
        return sum(piece.size for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        """The parts of chunks of all files."""
        for file in self.files:
            yield from file.pieces()

    def chunks(self) -> frozenset[str]:
        """The names of all chunks."""
        return frozenset(piece.chunk for piece in self.pieces())


@dataclass(frozen=True)
class Usage:
    """The size of a published snapshot, in bytes.

    Attributes:
        image_bytes: of its files, including holes.
        data_bytes: of its files without holes.
        stored_bytes: of its chunks as they are stored, each counted once.
        unique_bytes: of those chunks that no other snapshot uses; deleting the snapshot frees them.
        chunks: the number of its chunks.
    """

    image_bytes: int
    data_bytes: int
    stored_bytes: int
    unique_bytes: int
    chunks: int


@dataclass(frozen=True)
class PrunePlan:
    """What a prune would delete.

    Attributes:
        garbage: chunks that no snapshot names, marks of damage without a chunk, and leftovers of killed
            writers, all older than the grace time.
        tombstones: of snapshots that were deleted longer ago than the grace time.
        kept_bytes: stored bytes of all other chunks.
        cutoff: objects written after this time are kept in any case.
    """

    garbage: tuple[ObjectInfo, ...]
    tombstones: tuple[ObjectInfo, ...]
    kept_bytes: int
    cutoff: datetime

    @property
    def garbage_bytes(self) -> int:
        """Stored bytes of the garbage."""
        return sum(item.size for item in self.garbage)


@dataclass(frozen=True)
class PruneResult:
    """What a prune deleted; ``spared`` objects had come into use since the plan."""

    deleted: int
    deleted_bytes: int
    spared: int

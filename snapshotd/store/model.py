"""The facts of the store: objects, published snapshots, and what garbage collection would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from snapshotd.model import Manifest

# Plain bytes of a chunk; the last one of a file is shorter.
CHUNK = 4 << 20


@dataclass(frozen=True)
class ObjectInfo:
    """An object's key, its size in bytes and when it was last written."""

    key: str
    size: int
    modified: datetime


@dataclass(frozen=True)
class Run:
    """Consecutive pieces of a file: the names of their chunks, or none of them for a hole of zeros."""

    pieces: int
    chunks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One chunk's place in a file, in bytes."""

    file: str
    offset: int
    size: int
    chunk: str


@dataclass(frozen=True)
class PublishedFile:
    """An image file as runs of chunks and holes."""

    name: str
    size: int
    runs: tuple[Run, ...]

    def pieces(self) -> Iterator[Piece]:
        """Where each chunk belongs; holes are left out."""
        index = 0
        for run in self.runs:
            for number, chunk in enumerate(run.chunks, index):
                offset = number * CHUNK
                yield Piece(self.name, offset, min(CHUNK, self.size - offset), chunk)
            index += run.pieces


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
class GcPlan:
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
class GcResult:
    """What garbage collection deleted; ``spared`` objects had come into use since the plan."""

    deleted: int
    deleted_bytes: int
    spared: int

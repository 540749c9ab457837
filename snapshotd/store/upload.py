"""Put a snapshot's chunks into the store: those that are missing, each once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from dumont.errors import DataLoss
from snapshotd.failpoints import Failpoints
from snapshotd.model import ImageFile, Manifest
from snapshotd.store.chunking import join_pieces, pieces_of, read_piece
from snapshotd.store.codec import Codec
from snapshotd.store.layout import chunk_key, damage_key
from snapshotd.store.model import CHUNK, ObjectInfo, PublishedFile
from snapshotd.store.ports import ObjectStore, Progress
from snapshotd.store.workers import Counter, Workers


@dataclass(frozen=True)
class Place:
    """A piece of a file that is to be uploaded."""

    file: ImageFile
    index: int

    @property
    def size(self) -> int:
        return min(CHUNK, self.file.size - self.index * CHUNK)


class Upload:
    """One snapshot on its way into the store.

    A chunk that is already there counts only while garbage collection will surely leave it alone until
    the manifest is published: it is younger than half the grace, or a snapshot names it (whose deletion
    would keep it for the whole grace). Any other is written again, which makes it young; so is one that
    somebody found damaged, which heals it for all snapshots that name it.

    Args:
        damaged: chunks not to count on.
        named: the chunks that published snapshots name; asked at most once.
    """

    def __init__(
        self,
        manifest: Manifest,
        images: Path,
        codec: Codec,
        objects: ObjectStore,
        workers: Workers,
        failpoints: Failpoints,
        now: Callable[[], datetime],
        grace: timedelta,
        damaged: frozenset[str],
        named: Callable[[], Awaitable[frozenset[str]]],
    ) -> None:
        self._manifest = manifest
        self._images = images
        self._codec = codec
        self._objects = objects
        self._workers = workers
        self._failpoints = failpoints
        self._now = now
        self._trusted_age = grace / 2
        self._damaged = damaged
        self._named = named
        self._named_chunks: frozenset[str] | None = None
        self._names: dict[str, list[str | None]] = {
            file.name: [None] * pieces_of(file.size) for file in manifest.files
        }
        self._claimed: set[str] = set()
        self._rewritten: list[Place] = []

    async def run(self, progress: Progress) -> tuple[PublishedFile, ...]:
        """Upload what is missing; answers the files as runs of chunks that are all in the store."""
        self._check_sizes()
        began = self._now()
        counter = Counter(sum(file.size for file in self._manifest.files), progress)

        async def send(place: Place) -> None:
            await self._send(place)
            counter.add(place.size)

        await self._workers.each(self._places(), send)
        # A collector that looked just before a chunk was written again may just have removed it.
        await self._workers.each(self._rewritten, self._confirm)
        if self._now() - began > self._trusted_age:
            await self._workers.each(self._places(), self._confirm)
        return tuple(
            join_pieces(file.name, file.size, self._names[file.name]) for file in self._manifest.files
        )

    def _places(self) -> Iterator[Place]:
        for file in self._manifest.files:
            for index in range(pieces_of(file.size)):
                yield Place(file, index)

    def _check_sizes(self) -> None:
        for file in self._manifest.files:
            path = self._images / file.name
            actual = path.stat().st_size if path.is_file() else -1
            if actual != file.size:
                raise DataLoss(
                    "IMAGE_DAMAGED",
                    f"{file.name} of snapshots/{self._manifest.id} has {actual} bytes instead of {file.size}",
                    metadata={"file": file.name, "snapshot": self._manifest.id},
                )

    async def _send(self, place: Place) -> None:
        name, plain = await self._workers.compute(self._read, place)
        self._names[place.file.name][place.index] = name
        if name is None or name in self._claimed:
            return
        self._claimed.add(name)
        found = await self._objects.stat(chunk_key(name))
        if found is not None and name not in self._damaged:
            if await self._will_stay(name, found):
                return
            self._rewritten.append(place)
        await self._put(name, plain)
        if name in self._damaged:
            await self._objects.delete(damage_key(name))

    async def _put(self, name: str, plain: bytes) -> None:
        self._failpoints.hit("upload.chunk")
        await self._objects.put(chunk_key(name), await self._workers.compute(self._codec.pack, name, plain))
        self._failpoints.hit("upload.chunk.after")

    async def _confirm(self, place: Place) -> None:
        name = self._names[place.file.name][place.index]
        if name is None or await self._objects.stat(chunk_key(name)) is not None:
            return
        again, plain = await self._workers.compute(self._read, place)
        if again != name:
            raise DataLoss(
                "IMAGE_DAMAGED",
                f"{place.file.name} of snapshots/{self._manifest.id} changed while it was uploaded",
                metadata={"file": place.file.name, "snapshot": self._manifest.id},
            )
        await self._put(name, plain)

    def _read(self, place: Place) -> tuple[str | None, bytes]:
        plain = read_piece(self._images / place.file.name, place.index, place.file.size)
        return (None, b"") if plain is None else (self._codec.name(plain), plain)

    async def _will_stay(self, name: str, found: ObjectInfo) -> bool:
        if self._now() - found.modified < self._trusted_age:
            return True
        if self._named_chunks is None:
            self._named_chunks = await self._named()
        return name in self._named_chunks

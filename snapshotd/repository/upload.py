"""Upload the chunks of a snapshot that are missing in the store, each once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

from dumont.errors import DataLoss
from snapshotd.failpoints import Failpoints
from snapshotd.model import Manifest
from snapshotd.repository.chunking import Content, cut, join, read, size_of
from snapshotd.repository.codec import Codec
from snapshotd.repository.model import ObjectInfo, PublishedFile
from snapshotd.repository.object_keys import chunk_key, damage_key
from snapshotd.repository.ports import ByteProgress, ObjectStore
from snapshotd.repository.workers import Counter, Workers


class Upload:
    """One snapshot on its way into the store.

    A chunk that is there already is relied on only if no prune can remove it before the manifest is
    published: it is younger than half the grace time, or a snapshot names it, whose deletion would protect it
    for the whole grace time. Any other chunk is written again, which makes it young. So is a chunk that was
    found damaged, which repairs every snapshot that names it.

    Args:
        damaged: chunks that must not be relied on.
        named: finds the chunks that published snapshots name; called at most once.
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
        self._contents = list(cut(manifest.files))
        # The chunk of each content; None if it is all zeros.
        self._names: dict[Content, str | None] = {}
        self._claimed: set[str] = set()
        self._rewritten: list[Content] = []

    async def run(self, progress: ByteProgress) -> tuple[PublishedFile, ...]:
        """Upload what is missing.

        Returns:
            The files as extents of chunks, all of which are in the store.
        """
        self._check_sizes()
        began = self._now()
        counter = Counter(sum(file.size for file in self._manifest.files), progress)

        async def send(content: Content) -> None:
            await self._send(content)
            counter.add(size_of(content))

        await self._workers.each(self._contents, send)
        # A prune that looked just before a chunk was written again may have removed it.
        await self._workers.each(self._rewritten, self._confirm)
        if self._now() - began > self._trusted_age:
            await self._workers.each(self._contents, self._confirm)
        return join(self._manifest.files, self._names)

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

    async def _send(self, content: Content) -> None:
        name, plain = await self._workers.compute(self._read, content)
        self._names[content] = name
        if name is None or name in self._claimed:
            return
        self._claimed.add(name)
        found = await self._objects.stat(chunk_key(name))
        if found is not None and name not in self._damaged:
            if await self._will_stay(name, found):
                return
            self._rewritten.append(content)
        packed = await self._workers.compute(self._codec.pack, name, plain)
        # A slow store keeps the packed bytes in memory for long; the plain bytes are several times as many.
        del plain
        await self._put(name, packed)
        if name in self._damaged:
            await self._objects.delete(damage_key(name))

    async def _put(self, name: str, packed: bytes) -> None:
        self._failpoints.hit("upload.chunk")
        await self._objects.put(chunk_key(name), packed)
        self._failpoints.hit("upload.chunk.after")

    async def _confirm(self, content: Content) -> None:
        name = self._names[content]
        if name is None or await self._objects.stat(chunk_key(name)) is not None:
            return
        again, plain = await self._workers.compute(self._read, content)
        if again != name:
            raise DataLoss(
                "IMAGE_DAMAGED",
                f"{content[0].file} of snapshots/{self._manifest.id} changed while it was uploaded",
                metadata={"file": content[0].file, "snapshot": self._manifest.id},
            )
        await self._put(name, await self._workers.compute(self._codec.pack, name, plain))

    def _read(self, content: Content) -> tuple[str | None, bytearray]:
        plain = read(self._images, content)
        return (None, bytearray()) if plain is None else (self._codec.name(plain), plain)

    async def _will_stay(self, name: str, found: ObjectInfo) -> bool:
        if self._now() - found.modified < self._trusted_age:
            return True
        if self._named_chunks is None:
            self._named_chunks = await self._named()
        return name in self._named_chunks

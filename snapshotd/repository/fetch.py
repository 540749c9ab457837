"""Fetch the files of a published snapshot. Every byte is verified before the fetch ends."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from dumont.errors import Aborted, DataLoss, DumontError, FailedPrecondition, NotFound, ResourceExhausted
from snapshotd.failpoints import Failpoints
from snapshotd.repository.chunk_writer import ChunkWriter, Unpack
from snapshotd.repository.codec import OVERHEAD, Codec, damaged
from snapshotd.repository.model import Piece, PublishedSnapshot
from snapshotd.repository.object_keys import chunk_key, damage_key
from snapshotd.repository.ports import ByteProgress, BytesLike, ObjectStore
from snapshotd.repository.workers import Counter, Turnstile, Workers

# Bytes of the disk that a fetch must leave free.
ROOM_TO_SPARE = 64 << 20


class Fetch:
    """Reads the chunks of one published snapshot."""

    def __init__(
        self,
        published: PublishedSnapshot,
        codec: Codec,
        objects: ObjectStore,
        workers: Workers,
        failpoints: Failpoints,
    ) -> None:
        self._published = published
        self._codec = codec
        self._objects = objects
        self._workers = workers
        self._failpoints = failpoints

    async def into(self, folder: Path, progress: ByteProgress) -> None:
        """Write all files into ``folder``. If this fails, it contains some of them.

        Raises:
            DataLoss: CHUNK_MISSING or CHUNK_DAMAGED.
            ResourceExhausted: DISK_FULL.
        """
        places = await self._workers.compute(self._lay_out, folder)
        turnstile = Turnstile()

        async def write(pieces: list[Piece]) -> None:
            self._failpoints.hit("fetch.chunk")
            await self._read(pieces, partial(_place, places, folder, pieces, turnstile))
            self._failpoints.hit("fetch.chunk.after")

        try:
            await self._each_chunk(write, progress)
        finally:
            # Nobody must remove the files while a thread writes to them.
            await self._workers.compute(turnstile.shut)

    async def check(self, progress: ByteProgress) -> None:
        """Read and verify every chunk. Nothing is written.

        Raises:
            DataLoss: chunks are missing or damaged; all of their files are named.
        """
        failures: list[tuple[Piece, DumontError]] = []

        async def look(pieces: list[Piece]) -> None:
            try:
                await self._read(pieces, _discard)
            except DataLoss as error:
                failures.extend((piece, error) for piece in pieces)

        await self._each_chunk(look, progress)
        if failures:
            files = sorted({piece.file for piece, _ in failures})
            first = failures[0][1]
            raise DataLoss(
                first.reason,
                f"{len(failures)} parts of {len(files)} files of snapshots/{self._published.manifest.id} "
                f"are lost, in {', '.join(files[:8])}; the first: {first.message}",
                metadata={**first.metadata, "pieces": str(len(failures)), "files": ",".join(files[:64])},
            )

    async def _each_chunk(
        self, work: Callable[[list[Piece]], Awaitable[None]], progress: ByteProgress
    ) -> None:
        # A chunk that belongs in several places is fetched once.
        places: dict[str, list[Piece]] = {}
        for piece in self._published.pieces():
            places.setdefault(piece.chunk, []).append(piece)
        counter = Counter(self._published.data_size, progress)

        async def counted(pieces: list[Piece]) -> None:
            await work(pieces)
            counter.add(sum(piece.size for piece in pieces))

        await self._workers.each(places.values(), counted)

    async def _read(self, pieces: list[Piece], use: Callable[[Unpack], object]) -> None:
        """Read a chunk and have ``use`` unpack it, which raises ``DataLoss`` if its bytes are wrong."""
        piece = pieces[0]

        def work(stored: BytesLike) -> None:
            with self._workers.cores:
                use(partial(self._codec.open, piece.chunk, stored, piece.chunk_size))

        try:
            try:
                # One thread reads, unpacks, verifies and writes the chunk. Each detour by the event loop to
                # another thread would wait for the interpreter's lock, which on many cores takes a third of
                # all time.
                await self._objects.read(
                    chunk_key(piece.chunk), piece.chunk_size + OVERHEAD, work, self._workers.wait
                )
            except NotFound:
                raise DataLoss(
                    "CHUNK_MISSING",
                    f"chunk {piece.chunk[:16]}… is not in the store",
                    metadata={"chunk": piece.chunk},
                ) from None
            except DataLoss as error:
                if error.reason != "OBJECT_TOO_LARGE":
                    raise
                raise damaged(piece.chunk, error.message) from None
        except DataLoss as error:
            if error.reason in ("CHUNK_DAMAGED", "CHUNK_MISSING"):
                # Mark the chunk, so that no upload relies on it. The error below is raised even if that
                # fails.
                with contextlib.suppress(DumontError):
                    await self._objects.put(damage_key(piece.chunk), b"")
            error.metadata |= {"file": piece.file, "snapshot": self._published.manifest.id}
            raise

    def _lay_out(self, folder: Path) -> ChunkWriter:
        """Make the files at their full sizes, as holes."""
        needed, free = self._published.data_size + ROOM_TO_SPARE, shutil.disk_usage(folder).free
        if needed > free:
            raise _full(
                f"snapshots/{self._published.manifest.id} needs {needed} bytes in {folder.parent}, where "
                f"{free} are free"
            )
        for file in self._published.files:
            try:
                descriptor = os.open(
                    folder / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600
                )
            except FileExistsError:
                raise FailedPrecondition(
                    "FETCH_INTO_USED_DIRECTORY",
                    f"{file.name} is in the directory already; fetch into an empty one",
                    metadata={"file": file.name},
                ) from None
            try:
                os.truncate(descriptor, file.size)
            finally:
                os.close(descriptor)
        return ChunkWriter(folder, self._workers.threads)


def _place(
    places: ChunkWriter, folder: Path, pieces: list[Piece], turnstile: Turnstile, unpack: Unpack
) -> None:
    with turnstile.passed() as in_time:
        if not in_time:
            raise Aborted("FETCH_STOPPED", f"a chunk arrived after its fetch into {folder.name} had ended")
        try:
            places.fill(pieces, unpack)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(f"{folder.parent} filled up while a snapshot was fetched") from None
            raise


def _discard(unpack: Unpack) -> None:
    """Verify a chunk and drop its bytes."""
    unpack(None)


def _full(why: str) -> ResourceExhausted:
    return ResourceExhausted("DISK_FULL", f"{why}; delete snapshots or use a larger disk")

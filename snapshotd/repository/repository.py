"""Published snapshots in an object store: publish, list, fetch, verify, delete, undelete and prune them."""

from __future__ import annotations

import contextlib
import os
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from dumont.aio import to_completion
from dumont.errors import AlreadyExists, DataLoss, FailedPrecondition, NotFound, PermissionDenied
from snapshotd import manifest as manifests
from snapshotd.failpoints import Failpoints
from snapshotd.model import Manifest
from snapshotd.repository import document, prune
from snapshotd.repository.codec import DATA_KEY, Codec
from snapshotd.repository.fetch import Fetch
from snapshotd.repository.model import (
    ObjectInfo,
    PrunePlan,
    PruneResult,
    PublishedSnapshot,
    Usage,
    WrappedKey,
)
from snapshotd.repository.object_keys import (
    DAMAGED,
    DELETED,
    SNAPSHOTS,
    chunk_key,
    chunk_of,
    manifest_key,
    snapshot_of,
    tombstone_key,
)
from snapshotd.repository.ports import ByteProgress, KeyWrapper, ObjectStore, Trust
from snapshotd.repository.signing import Signer
from snapshotd.repository.upload import Upload
from snapshotd.repository.workers import Workers

log = structlog.get_logger(__name__)

GRACE = timedelta(hours=24)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def no_progress(done: int, total: int) -> None:
    """Ignore the progress."""


class Repository:
    """Published snapshots over any :class:`ObjectStore`.

    Args:
        signer: signs the snapshots that this node publishes.
        trusted: the keys whose signatures are trusted.
        wrapper: wraps data keys; None if nothing is encrypted and nothing encrypted can be read.
        workers: chunks in flight; each takes up to 24 MiB of memory.
        threads: threads that hash, compress, encrypt and unpack.
        grace: a prune spares younger objects. It must be the same for all nodes that share the store.
    """

    def __init__(
        self,
        objects: ObjectStore,
        signer: Signer,
        trusted: Trust,
        wrapper: KeyWrapper | None = None,
        *,
        workers: int = 8,
        threads: int | None = None,
        grace: timedelta = GRACE,
        now: Callable[[], datetime] = _utc_now,
        failpoints: Failpoints | None = None,
    ) -> None:
        self.objects = objects
        self.grace = grace
        self._signer = signer
        self._trusted = trusted
        self._wrapper = wrapper
        self._workers = Workers(workers, threads or len(os.sched_getaffinity(0)))
        self._now = now
        self._failpoints = failpoints or Failpoints()
        self._pins: Tally[str] = Tally()
        # A published document never changes, so a list does not read a verified one again.
        self._known: dict[ObjectInfo, PublishedSnapshot | None] = {}
        self._known_by = trusted.ids

    def close(self) -> None:
        """End the threads."""
        self._workers.close()

    @property
    def trusted(self) -> frozenset[str]:
        """The ids of the keys that are trusted now."""
        return self._trusted.ids

    def new_key(self, snapshot: str) -> WrappedKey | None:
        """A new data key for one snapshot; None if nothing is encrypted.

        Keep it for the retry of an interrupted upload, which with another key would send all chunks again.
        """
        if self._wrapper is None:
            return None
        return WrappedKey(
            self._wrapper.key_id, self._wrapper.wrap(os.urandom(DATA_KEY), _key_context(snapshot))
        )

    async def publish(
        self,
        manifest: Manifest,
        images: Path,
        progress: ByteProgress = no_progress,
        key: WrappedKey | None = None,
        again: bool = False,
    ) -> PublishedSnapshot:
        """Upload the chunks that are missing, then publish the manifest. Repeating it is no error.

        Args:
            images: the directory with the manifest's files.
            key: from :meth:`new_key`; None for a new one, if this node encrypts.
            again: upload missing and damaged chunks even if the snapshot is published.

        Raises:
            AlreadyExists: another snapshot of that id is published.
            DataLoss: the files are not those of the manifest.
        """
        published = await self._published_by_us(manifest)
        if published is not None and not again:
            progress(published.size, published.size)
            return published
        # With another key, the chunks would be other ones.
        key = published.key if published is not None else key or self.new_key(manifest.id)
        upload = Upload(
            manifest,
            images,
            self._codec(manifest.id, key),
            self.objects,
            self._workers,
            self._failpoints,
            self._now,
            self.grace,
            await self.damaged_chunks(),
            lambda: prune.Marks(self.objects).named(None),
        )
        files = await upload.run(progress)
        data, published = document.encode(manifest, files, key, self._signer)
        self._failpoints.hit("upload.manifest")
        try:
            # Uninterrupted: whoever cancels this in order to delete the snapshot must find what there is to
            # delete.
            await to_completion(self.objects.create(manifest_key(manifest.id), data))
        except AlreadyExists:
            # It may be our own, if the answer to an earlier attempt was lost.
            published = await self._published_by_us(manifest) or published
        self._failpoints.hit("upload.manifest.after")
        return published

    async def get(self, snapshot: str) -> PublishedSnapshot:
        """A published snapshot, whose signature has been verified.

        Raises:
            NotFound: SNAPSHOT_NOT_FOUND, none of that id is published.
            PermissionDenied: UNTRUSTED_SIGNER, it is signed by a key that is not trusted here.
            DataLoss: MANIFEST_DAMAGED and the like, its manifest cannot be read.
        """
        try:
            data = await self.objects.get(manifest_key(snapshot), document.LARGEST)
        except NotFound:
            raise _unknown(snapshot) from None
        except DataLoss as error:
            raise DataLoss("MANIFEST_DAMAGED", error.message, metadata={"snapshot": snapshot}) from None
        return await self._workers.compute(document.decode, data, snapshot, self._trusted)

    async def list(self) -> list[PublishedSnapshot]:
        """Every published snapshot that this node trusts, by id. Others are logged once and left out."""
        items = [item async for item in self.objects.list(SNAPSHOTS) if snapshot_of(item.key)]
        if self._known_by != self._trusted.ids:
            self._known, self._known_by = {}, self._trusted.ids
        fresh = [item for item in items if item not in self._known]
        known = {item: self._known[item] for item in items if item in self._known}

        async def read(item: ObjectInfo) -> None:
            snapshot = snapshot_of(item.key) or ""
            try:
                known[item] = await self.get(snapshot)
            except NotFound:
                return
            except (DataLoss, PermissionDenied) as error:
                log.error(
                    "published_snapshot_rejected",
                    snapshot=snapshot,
                    reason=error.reason,
                    error=error.message,
                )
                known[item] = None

        await self._workers.each(fresh, read)
        self._known = known
        return sorted(
            (found for found in known.values() if found is not None), key=lambda found: found.manifest.id
        )

    async def fetch(
        self, published: PublishedSnapshot, into: Path, progress: ByteProgress = no_progress
    ) -> None:
        """Write the snapshot's files into an empty directory. Every chunk is verified.

        Raises:
            DataLoss: CHUNK_MISSING or CHUNK_DAMAGED.
            FailedPrecondition: KEY_MISSING, it is encrypted and this node lacks the key.
            ResourceExhausted: DISK_FULL.
        """
        with self._pinned(published):
            await self._reader(published).into(into, progress)

    async def verify(self, published: PublishedSnapshot, progress: ByteProgress = no_progress) -> None:
        """Read and verify every chunk; raises as :meth:`fetch` does, and names every damaged file."""
        with self._pinned(published):
            await self._reader(published).check(progress)

    async def usage(self, published: PublishedSnapshot) -> Usage:
        """The size of a snapshot in the store, and how much of that it does not share."""
        others: set[str] = set()
        for other in await self.list():
            if other.manifest.id != published.manifest.id:
                others |= other.chunks()
        stored = unique = 0

        async def measure(chunk: str) -> None:
            nonlocal stored, unique
            found = await self.objects.stat(chunk_key(chunk))
            size = found.size if found is not None else 0
            stored += size
            unique += 0 if chunk in others else size

        chunks = published.chunks()
        await self._workers.each(chunks, measure)
        return Usage(published.size, published.data_size, stored, unique, len(chunks))

    async def delete(self, snapshot: str) -> None:
        """Unpublish a snapshot. A prune removes its chunks after the grace time.

        Raises:
            NotFound: SNAPSHOT_NOT_FOUND, none of that id is published.
        """
        key = manifest_key(snapshot)
        if await self.objects.stat(key) is None:
            raise _unknown(snapshot)
        with contextlib.suppress(NotFound, DataLoss):
            data = await self.objects.get(key, document.LARGEST)
            document.named_chunks(data)
            self._failpoints.hit("delete.tombstone")
            await self.objects.put(tombstone_key(snapshot, document.digest(data)), data)
        self._failpoints.hit("delete.manifest")
        await self.objects.delete(key)
        self._failpoints.hit("delete.manifest.after")

    async def damaged_chunks(self) -> frozenset[str]:
        """The chunks that a node has found damaged or missing, and that no node has uploaded again."""
        return frozenset([chunk_of(item.key) async for item in self.objects.list(DAMAGED)])

    async def undelete(self, snapshot: str) -> PublishedSnapshot:
        """Publish a deleted snapshot again, while its tombstone still protects its chunks.

        Raises:
            NotFound: SNAPSHOT_NOT_DELETED, there is no tombstone of it within the grace time.
            AlreadyExists: a snapshot of that id is published.
            PermissionDenied: it is signed by a key that is not trusted here.
            DataLoss: its manifest is damaged, or a chunk is missing.
        """
        cutoff = self._now() - self.grace
        deleted = [item async for item in self.objects.list(DELETED) if item.modified > cutoff]
        tombstones = [item for item in deleted if item.key.startswith(f"{DELETED}{snapshot}/")]
        if not tombstones:
            others = sorted({item.key.split("/")[1] for item in deleted})
            raise NotFound(
                "SNAPSHOT_NOT_DELETED",
                f"no snapshots/{snapshot} was deleted from the store within its grace time of "
                f"{self.grace.total_seconds():.0f} s; those that were: {', '.join(others[:20]) or 'none'}",
                metadata={"snapshot": snapshot},
            )
        # A snapshot that was deleted, captured again and deleted again has several; the newest counts.
        newest = max(tombstones, key=lambda item: item.modified)
        data = await self.objects.get(newest.key, document.LARGEST)
        published = await self._workers.compute(document.decode, data, snapshot, self._trusted)
        missing: list[str] = []

        async def look(chunk: str) -> None:
            if await self.objects.stat(chunk_key(chunk)) is None:
                missing.append(chunk)

        await self._workers.each(published.chunks(), look)
        if missing:
            raise DataLoss(
                "CHUNK_MISSING",
                f"{len(missing)} chunks of the deleted snapshots/{snapshot} are gone; it cannot be restored",
                metadata={"snapshot": snapshot, "missing": str(len(missing))},
            )
        # The tombstone stays for the rest of its time, so that a concurrent prune sees one of the two.
        await to_completion(self.objects.create(manifest_key(snapshot), data))
        return published

    async def plan_prune(self, now: datetime | None = None, grace: timedelta | None = None) -> PrunePlan:
        """What a prune would delete. Changes nothing.

        Raises:
            FailedPrecondition: GC_BLOCKED, a manifest cannot be read, so it is unknown which chunks it names.
        """
        cutoff = (now or self._now()) - (self.grace if grace is None else grace)
        return await prune.plan(self.objects, cutoff, self._pinned_chunks)

    async def prune(self, plan: PrunePlan) -> PruneResult:
        """Delete what the plan names, except what has come into use since."""
        return await prune.execute(plan, self.objects, self._workers, self._failpoints, self._pinned_chunks)

    async def _published_by_us(self, manifest: Manifest) -> PublishedSnapshot | None:
        """The published snapshot of this manifest; None if no snapshot of its id is published.

        Raises:
            AlreadyExists: SNAPSHOT_EXISTS, another snapshot of the id is published.
        """
        try:
            found = await self.get(manifest.id)
        except NotFound:
            return None
        except (DataLoss, PermissionDenied) as error:
            raise _exists(manifest.id) from error
        if found.signer != self._signer.key_id or manifests.encode(found.manifest) != manifests.encode(
            manifest
        ):
            raise _exists(manifest.id)
        return found

    def _reader(self, published: PublishedSnapshot) -> Fetch:
        codec = self._codec(published.manifest.id, published.key)
        return Fetch(published, codec, self.objects, self._workers, self._failpoints)

    def _codec(self, snapshot: str, key: WrappedKey | None) -> Codec:
        if key is None:
            return Codec(snapshot, None)
        if self._wrapper is None or self._wrapper.key_id != key.key_id:
            raise FailedPrecondition(
                "KEY_MISSING",
                f"snapshots/{snapshot} is encrypted and its key is wrapped by key {key.key_id[:64]}, which "
                "this node does not have; set its encryption key file",
                metadata={"snapshot": snapshot, "key_id": key.key_id[:64]},
            )
        data_key = self._wrapper.unwrap(key.wrapped, _key_context(snapshot))
        if len(data_key) != DATA_KEY:
            raise DataLoss("KEY_DAMAGED", f"the data key of snapshots/{snapshot} has the wrong length")
        return Codec(snapshot, data_key)

    @contextlib.contextmanager
    def _pinned(self, published: PublishedSnapshot) -> Iterator[None]:
        """Protect the chunks that are being read from a prune by this process."""
        chunks = published.chunks()
        self._pins.update(chunks)
        try:
            yield
        finally:
            self._pins.subtract(chunks)
            self._pins = +self._pins

    def _pinned_chunks(self) -> frozenset[str]:
        return frozenset(self._pins)


async def check_conditional_create(objects: ObjectStore) -> None:
    """Check that of two creators of an object only one succeeds. Run it before anything is published.

    Raises:
        FailedPrecondition: STORE_NOT_CONDITIONAL, both do, so two nodes could overwrite each other's work.
        DumontError: the store cannot be written, read or reached.
    """
    key = f"tmp/probe-{os.urandom(8).hex()}"
    await objects.create(key, b"first")
    try:
        await objects.create(key, b"second")
    except AlreadyExists:
        if await objects.get(key, 16) == b"first":
            return
    finally:
        await objects.delete(key)
    raise FailedPrecondition(
        "STORE_NOT_CONDITIONAL",
        "the store overwrote an object that it should have created only if there was none; use a store with "
        "working conditional writes (If-None-Match)",
    )


def _key_context(snapshot: str) -> bytes:
    return b"dumont data key v1\0" + snapshot.encode()


def _unknown(snapshot: str) -> NotFound:
    return NotFound(
        "SNAPSHOT_NOT_FOUND",
        f"the store has no snapshots/{snapshot}",
        metadata={"snapshot": snapshot},
    )


def _exists(snapshot: str) -> AlreadyExists:
    return AlreadyExists(
        "SNAPSHOT_EXISTS",
        f"another snapshots/{snapshot} is published; choose another id",
        metadata={"snapshot": snapshot},
    )

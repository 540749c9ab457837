"""The snapshots that this node can restore: those it holds, and those published in its object store.

The node's own store is a cache of the object store: a published snapshot may be evicted and is fetched again.
A snapshot that is not published exists on this node alone, and only ``delete`` removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import structlog

from dumont.errors import DataLoss, DumontError, FailedPrecondition, NotFound, PermissionDenied
from snapshotd import eviction
from snapshotd import manifest as manifests
from snapshotd.eviction import Candidate
from snapshotd.model import Snapshot
from snapshotd.ports import SnapshotStore
from snapshotd.repository.model import PrunePlan, PublishedSnapshot, Usage
from snapshotd.repository.object_keys import SNAPSHOTS, snapshot_of
from snapshotd.repository.ports import ByteProgress
from snapshotd.repository.repository import Repository
from snapshotd.repository.signing import untrusted
from snapshotd.snapshots.uploads import Uploads
from snapshotd.system.disk import DiskReservations

log = structlog.get_logger(__name__)

# A list waits this long for the object store, and then shows what the store last answered.
LIST_SECONDS = 5.0
# Reasons for which the bytes of a copy are not those captured. The same snapshot may be intact elsewhere.
DAMAGE = frozenset({"IMAGE_DAMAGED", "MANIFEST_DAMAGED"})


@dataclass(frozen=True)
class RejectedSnapshot:
    """A snapshot that this node does not accept because its manifest is damaged or its signer not trusted."""

    snapshot: str
    reason: str
    # Whether it is this node's copy, or the one in the object store.
    local: bool = False

    @classmethod
    def because(cls, snapshot: str, error: DumontError, local: bool = False) -> RejectedSnapshot:
        """The rejection of a snapshot for an error."""
        return cls(snapshot, f"{error.reason}: {error.message}", local)


@dataclass(frozen=True)
class Remote:
    """The object store of this node: the snapshots published there, and the uploads into it."""

    repository: Repository
    uploads: Uploads


class SnapshotUsers(Protocol):
    """Those who use the files of snapshots on this node."""

    @property
    def pinned(self) -> Mapping[str, int]:
        """How many jobs read a snapshot now, by its id."""
        ...

    def mapped(self) -> AbstractSet[str]:
        """The snapshots from which instances map their memory."""
        ...


@dataclass
class _Fetching:
    task: asyncio.Task[None]
    waiting: int = 0


@dataclass(frozen=True)
class _Published:
    """The published snapshots when they were last listed.

    Attributes:
        damaged: why some of them are damaged, according to the nodes that have read them.
    """

    found: Mapping[str, PublishedSnapshot] = field(default_factory=dict)
    rejected: Sequence[RejectedSnapshot] = ()
    damaged: Mapping[str, str] = field(default_factory=dict)


class Snapshots:
    """The snapshots of this node and of its object store.

    Args:
        remote: None if this node has no object store.
        damaged: directory of records of published snapshots that were found damaged.
        budget: bytes that the node's own snapshots may take; 0 for no limit.
        users: the instances of this node.
        disk: reserves the space that a fetch needs.
    """

    def __init__(
        self,
        store: SnapshotStore,
        remote: Remote | None,
        damaged: Path,
        budget: int,
        users: SnapshotUsers,
        disk: DiskReservations | None = None,
    ) -> None:
        self.store = store
        self.remote = remote
        self.damaged = damaged
        self.budget = budget
        self.users = users
        self.disk = disk or DiskReservations()
        self._fetches: dict[str, _Fetching] = {}
        self._published: dict[str, PublishedSnapshot] = {}
        # The listing under way, and the loop's time at which it began.
        self._listing: tuple[asyncio.Task[_Published], float] | None = None
        self._listed = _Published()
        # Why the last list may be out of date; empty if it is not.
        self.store_silence = ""

    # Queries

    async def get(self, snapshot: str) -> Snapshot:
        """A snapshot that this node holds intact or, if there is none of that id, a published one.

        Raises:
            NotFound: there is neither.
            DataLoss: its manifest is damaged.
            PermissionDenied: it is signed by a key that is not trusted here.
            Unavailable: this node does not hold it, and the object store cannot be reached.
        """
        held: Snapshot | None = None
        damage: DataLoss | None = None
        try:
            held = await self.store.get(snapshot)
        except NotFound:
            if self.remote is None:
                raise
        except DataLoss as error:
            if self.remote is None:
                raise
            damage = error
        if held is not None:
            # Its signer was trusted when it was fetched; the trusted keys may have changed since.
            if not self._trusts(held):
                raise untrusted(held.signer)
            if self.remote is None or not _damaged(held):
                return held
        assert self.remote is not None
        try:
            published = self._published[snapshot] = await self.remote.repository.get(snapshot)
        except DumontError as error:
            if held is not None:
                return held
            raise (damage if damage is not None and isinstance(error, NotFound) else error) from None
        there = self._as_snapshot(published)
        return held if held is not None and there.quarantine_reason else there

    async def get_exactly(self, snapshot: str, manifest_digest: str) -> Snapshot:
        """The snapshot whose manifest has a given digest; see :meth:`get`.

        Args:
            manifest_digest: empty if any snapshot of that id will do.

        Raises:
            DataLoss: MANIFEST_REPLACED, the snapshot of that id is another one.
        """
        found = await self.get(snapshot)
        if manifest_digest and found.digest != manifest_digest:
            raise DataLoss(
                "MANIFEST_REPLACED",
                f"the manifest of snapshots/{snapshot} has digest {found.digest[:16]}…, not the requested "
                f"{manifest_digest[:16]}…; it was replaced after its capture",
                metadata={"snapshot": snapshot},
            )
        if found.local:
            await self.store.touch(snapshot)
        return found

    async def list(self) -> tuple[Sequence[Snapshot], Sequence[RejectedSnapshot]]:
        """Every snapshot by id, and those that are rejected.

        If the object store does not answer in time, published snapshots are those that it last listed.
        """
        held, untrusted_here = {}, []
        for found in await self.store.list():
            if self._trusts(found):
                held[found.manifest.id] = found
            else:
                untrusted_here.append(
                    RejectedSnapshot.because(found.manifest.id, untrusted(found.signer), local=True)
                )
        damaged_here = [
            RejectedSnapshot.because(name, error, local=True) for name, error in self.store.unreadable.items()
        ]
        if self.remote is None:
            return sorted(held.values(), key=_id), [*untrusted_here, *damaged_here]
        published = await self._list_published()
        there = {name: self._as_snapshot(found) for name, found in published.found.items()}
        for name, reason in published.damaged.items():
            there[name] = replace(there[name], quarantine_reason=there[name].quarantine_reason or reason)
        found_here = {}
        for name, found in held.items():
            other = there.get(name)
            whole = other is not None and not other.quarantine_reason
            if not (_damaged(found) and whole):
                # A snapshot whose published copy is damaged counts as not published, so that it is published
                # again.
                found_here[name] = replace(found, published=whole or (found.published and self._silent(name)))
        known = {*held, *(one.snapshot for one in untrusted_here)}
        elsewhere = [one for one in published.rejected if one.snapshot not in known]
        listed = {*there, *(one.snapshot for one in elsewhere)}
        # A damaged copy of this node is not listed beside the published one.
        here_alone = [one for one in damaged_here if one.snapshot not in listed]
        rejected = [*untrusted_here, *elsewhere, *here_alone]
        return sorted((there | found_here).values(), key=_id), rejected

    def _silent(self, snapshot: str) -> bool:
        """Whether the last list says nothing of a snapshot, so that the node's own note of it counts."""
        return bool(self.store_silence) and snapshot not in self._listed.found

    async def _list_published(self) -> _Published:
        """The published snapshots, or those of the last list if the store takes longer than LIST_SECONDS.

        The listing goes on in the background, and the next caller waits for it before it begins its own: one
        that began before the call may lack what its caller has just published or deleted.
        """
        loop = asyncio.get_running_loop()
        called = loop.time()
        began = -1.0
        while began < called:
            if self._listing is None:
                task = asyncio.create_task(self._ask_published(), name="list what is published")
                self._listing = (task, loop.time())
            listing = self._listing
            task, began = listing
            done, _ = await asyncio.wait([task], timeout=max(0.0, called + LIST_SECONDS - loop.time()))
            if not done:
                self.store_silence = f"the object store did not answer within {LIST_SECONDS:g} s"
                break
            if self._listing is listing:
                self._listing = None
            error = task.exception()
            if error is None:
                self._listed, self.store_silence = task.result(), ""
            elif isinstance(error, DumontError):
                self.store_silence = f"{error.reason}: {error.message}"
                break
            else:
                raise error
        if self.store_silence:
            log.warning("published_snapshots_not_listed", error=self.store_silence)
        return self._listed

    async def _ask_published(self) -> _Published:
        assert self.remote is not None
        repository = self.remote.repository
        found = {one.manifest.id: one for one in await repository.list()}
        marked = await repository.damaged_chunks()
        damaged = {}
        for name, one in found.items():
            if hurt := one.chunks() & marked:
                damaged[name] = f"CHUNK_DAMAGED: {len(hurt)} of its chunks in the object store are damaged"
            elif (record := self._damage(one)).exists() and record.read_text().startswith("CHUNK_"):
                # A node that has an intact copy has sent those chunks again.
                record.unlink(missing_ok=True)
        return _Published(found, tuple(await self._rejected(set(found))), damaged)

    async def close(self) -> None:
        """Cancel a listing under way."""
        if self._listing is not None:
            self._listing[0].cancel()
            await asyncio.wait([self._listing[0]])

    async def _rejected(self, known: set[str]) -> Sequence[RejectedSnapshot]:
        assert self.remote is not None
        repository = self.remote.repository
        rejected = []
        async for item in repository.objects.list(SNAPSHOTS):
            snapshot = snapshot_of(item.key)
            if snapshot is None or snapshot in known:
                continue
            try:
                await repository.get(snapshot)
            except (DataLoss, PermissionDenied) as error:
                rejected.append(RejectedSnapshot.because(snapshot, error))
            except NotFound:
                continue
        return rejected

    async def usage(self, snapshot: str) -> tuple[PublishedSnapshot, Usage] | None:
        """What a snapshot takes in the object store; None if it is not there or cannot be read."""
        if self.remote is None:
            return None
        repository = self.remote.repository
        try:
            published = await repository.get(snapshot)
            return published, await repository.usage(published)
        except DumontError as error:
            log.info("published_size_unknown", snapshot=snapshot, reason=error.reason)
            return None

    # Fetching and publishing

    async def fetch(self, snapshot: Snapshot, progress: ByteProgress) -> None:
        """Fetch a published snapshot to this node. Callers that fetch the same one share one fetch.

        Raises:
            DataLoss: a chunk is missing or damaged. The snapshot is quarantined from now on.
            FailedPrecondition: SNAPSHOT_QUARANTINED, or KEY_MISSING.
            ResourceExhausted: there is too little space for it.
            Unavailable: the object store does not answer.
        """
        name = snapshot.manifest.id
        if snapshot.quarantine_reason:
            raise FailedPrecondition(
                "SNAPSHOT_QUARANTINED",
                f"snapshots/{name} is quarantined: {snapshot.quarantine_reason}",
                metadata={"snapshot": name},
            )
        fetching = self._fetches.get(name)
        if fetching is None:
            task = asyncio.create_task(self._fetch(snapshot, progress), name=f"fetch {name}")
            fetching = self._fetches[name] = _Fetching(task)
            task.add_done_callback(lambda _: self._fetches.pop(name, None))
        fetching.waiting += 1
        try:
            await asyncio.shield(fetching.task)
        finally:
            fetching.waiting -= 1
            if not fetching.waiting and not fetching.task.done():
                fetching.task.cancel()
                await asyncio.wait([fetching.task])

    async def _fetch(self, snapshot: Snapshot, progress: ByteProgress) -> None:
        assert self.remote is not None
        repository = self.remote.repository
        name = snapshot.manifest.id
        with contextlib.suppress(NotFound):
            # Another fetch may have ended since the caller looked.
            held = await self._held(name)
            if held is not None and held.digest == snapshot.digest and not _damaged(held):
                return
        published = self._published.get(name)
        if published is None or _digest(published) != snapshot.digest:
            published = await repository.get(name)
        await self._make_room(published.data_size)
        await self._make_way(name)
        into = await self.store.stage(name)
        try:
            await repository.fetch(published, into, progress)
            await self.store.commit(published.manifest, published.signer)
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(self.store.discard(name)))
            if isinstance(error, DataLoss):
                self._remember_damage(published, error)
            raise
        finally:
            self.disk.release(f"fetch {name}")
        log.info("snapshot_fetched", snapshot=name, bytes=published.data_size)

    async def _held(self, snapshot: str) -> Snapshot | None:
        """The snapshot that the node holds under an id; None if it cannot be read."""
        try:
            return await self.store.get(snapshot)
        except DataLoss:
            return None

    async def _make_way(self, snapshot: str) -> None:
        """Delete a damaged copy, so that an intact one can replace it."""
        with contextlib.suppress(NotFound):
            held = await self._held(snapshot)
            if held is not None and not _damaged(held):
                return
            # Files that an instance has mapped stay mapped.
            log.warning("damaged_copy_replaced", snapshot=snapshot)
            await self.store.delete(snapshot)

    async def publish(self, snapshot: str, progress: ByteProgress) -> Snapshot:
        """Upload a snapshot that this node holds; see :meth:`Uploads.publish`.

        Raises:
            FailedPrecondition: OBJECT_STORE_NOT_CONFIGURED, or SNAPSHOT_QUARANTINED.
        """
        uploads = self._configured().uploads
        held = await self.store.get(snapshot)
        if held.quarantine_reason:
            raise FailedPrecondition(
                "SNAPSHOT_QUARANTINED",
                f"snapshots/{snapshot} is quarantined and is not published: {held.quarantine_reason}",
                metadata={"snapshot": snapshot},
            )
        records = list(self.damaged.glob(f"{snapshot}.*"))
        again = bool(records) or snapshot in self._listed.damaged
        if not held.published or again:
            await uploads.publish(held, progress, again)
            for record in records:
                record.unlink(missing_ok=True)
            self._listed = replace(
                self._listed,
                damaged={name: why for name, why in self._listed.damaged.items() if name != snapshot},
            )
        return await self.store.get(snapshot)

    # Verifying, deleting, evicting

    async def verify(self, snapshot: str, progress: ByteProgress) -> tuple[int, int]:
        """Read all of a snapshot, here and in the object store. A damaged copy is quarantined.

        Returns:
            Bytes that were found intact on this node, and in the object store.

        Raises:
            NotFound: there is no such snapshot.
            DataLoss: it is damaged.
            PermissionDenied: it is signed by a key that is not trusted here.
        """
        found = await self.get(snapshot)
        here = 0
        if found.local:
            try:
                await self.store.verify(found, again=True)
            except DataLoss as error:
                await self.store.quarantine(snapshot, f"{error.reason}: {error.message}")
                raise
            here = found.size
        if self.remote is None or (found.local and not found.published):
            return here, 0
        repository = self.remote.repository
        published = await repository.get(snapshot)
        try:
            await repository.verify(published, progress)
        except DataLoss as error:
            self._remember_damage(published, error)
            raise
        self._damage(published).unlink(missing_ok=True)
        return here, published.data_size

    async def delete(self, snapshot: str) -> None:
        """Delete a snapshot from this node and from the object store.

        Raises:
            FailedPrecondition: SNAPSHOT_IN_USE, a job reads it.
            NotFound: there is no such snapshot.
            Unavailable: it is published, and the object store cannot be reached.
        """
        if self.users.pinned.get(snapshot) or snapshot in self._fetches:
            raise _in_use(snapshot)
        found = False
        if self.remote is not None and await self._may_be_published(snapshot):
            # Cancelled first, or its upload would publish the snapshot again.
            await self.remote.uploads.cancel(snapshot)
            with contextlib.suppress(NotFound):
                await self.remote.repository.delete(snapshot)
                found = True
            for record in self.damaged.glob(f"{snapshot}.*"):
                record.unlink(missing_ok=True)
        try:
            await self.store.delete(snapshot)
        except NotFound:
            if not found:
                raise

    async def undelete(self, snapshot: str) -> Snapshot:
        """Publish a snapshot again that was deleted less than the object store's grace time ago.

        Raises:
            FailedPrecondition: OBJECT_STORE_NOT_CONFIGURED.
            NotFound: SNAPSHOT_NOT_DELETED, nothing is left of it.
            DataLoss: part of it is gone.
        """
        repository = self._configured().repository
        published = self._published[snapshot] = await repository.undelete(snapshot)
        log.info("snapshot_undeleted", snapshot=snapshot)
        return self._as_snapshot(published)

    async def _may_be_published(self, snapshot: str) -> bool:
        assert self.remote is not None
        try:
            return (await self.store.get(snapshot)).published or self.remote.uploads.pending(snapshot)
        except DumontError:
            return True

    async def plan_prune(self) -> PrunePlan:
        """What a prune of the object store would delete.

        Raises:
            FailedPrecondition: OBJECT_STORE_NOT_CONFIGURED, or a published manifest cannot be read.
        """
        return await self._configured().repository.plan_prune()

    async def prune(self, plan: PrunePlan) -> None:
        """Delete what the plan names, except what has come into use since."""
        await self._configured().repository.prune(plan)

    async def enforce_budget(self) -> None:
        """Evict the least recently used published snapshots until the others are within the budget."""
        await self._make_room(0)

    def _used(self, snapshot: str) -> bool:
        return bool(self.users.pinned.get(snapshot)) or snapshot in self.users.mapped()

    async def _make_room(self, needed: int) -> None:
        entries = await self.store.entries()
        only_here: set[str] = set()
        while True:
            held = [
                Candidate(
                    entry.snapshot,
                    entry.size,
                    entry.last_use,
                    # Deleting a mapped file frees nothing.
                    removable=entry.published
                    and not self._used(entry.snapshot)
                    and entry.snapshot not in only_here,
                )
                for entry in entries
            ]
            evicted = eviction.snapshots_to_evict(held, self.budget, needed)
            lost = [snapshot for snapshot in evicted if not await self._in_store(snapshot)]
            if not lost:
                break
            log.warning("eviction_refused", snapshots=lost, why="the object store does not show them intact")
            only_here.update(lost)
        for snapshot in evicted:
            if self._used(snapshot):
                continue
            log.info("snapshot_evicted", snapshot=snapshot)
            # Another fetch may have evicted it meanwhile.
            with contextlib.suppress(NotFound):
                await self.store.delete(snapshot)

    async def _in_store(self, snapshot: str) -> bool:
        """Whether the object store still has a snapshot that was published, as far as is known intact."""
        if self.remote is None or snapshot in self._listed.damaged:
            return False
        try:
            return not self._as_snapshot(await self.remote.repository.get(snapshot)).quarantine_reason
        except DumontError:
            return False

    # Damage

    def _damage(self, published: PublishedSnapshot) -> Path:
        """Where damage of this document is recorded. Another document of the id is another snapshot."""
        return self.damaged / f"{published.manifest.id}.{published.digest}"

    def _remember_damage(self, published: PublishedSnapshot, error: DataLoss) -> None:
        log.error("published_snapshot_damaged", snapshot=published.manifest.id, reason=error.reason)
        try:
            self._damage(published).write_text(f"{error.reason}: {error.message}")
        except OSError as failure:
            # The next read will find the damage again.
            log.error("damage_not_remembered", snapshot=published.manifest.id, error=str(failure))

    def _as_snapshot(self, published: PublishedSnapshot) -> Snapshot:
        reason = ""
        with contextlib.suppress(FileNotFoundError):
            reason = self._damage(published).read_text()
        return Snapshot(published.manifest, _digest(published), reason, local=False, published=True)

    def _trusts(self, held: Snapshot) -> bool:
        """Whether a snapshot was captured here or its signer is trusted; without an object store none is."""
        return not held.signer or (self.remote is not None and held.signer in self.remote.repository.trusted)

    def _configured(self) -> Remote:
        if self.remote is None:
            raise FailedPrecondition(
                "OBJECT_STORE_NOT_CONFIGURED", "this node has no object store; start it with --store-url"
            )
        return self.remote


def _digest(published: PublishedSnapshot) -> str:
    """The digest of the manifest as a node keeps it, which is known before the snapshot is published."""
    return manifests.digest(manifests.encode(published.manifest))


def _id(snapshot: Snapshot) -> str:
    return snapshot.manifest.id


def _damaged(held: Snapshot) -> bool:
    """Whether the bytes of a copy are not those that were captured, so that another copy may be intact.

    A snapshot that was quarantined for a wrong answer is the same everywhere.
    """
    return held.quarantine_reason.partition(":")[0] in DAMAGE


def _in_use(snapshot: str) -> FailedPrecondition:
    return FailedPrecondition(
        "SNAPSHOT_IN_USE",
        f"snapshots/{snapshot} is being restored or captured from; try again when that is done",
        metadata={"snapshot": snapshot},
    )

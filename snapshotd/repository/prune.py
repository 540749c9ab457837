"""Prune a repository: make a plan, which changes nothing, and then carry it out.

Chunks that a published snapshot names are marked. A deleted snapshot leaves a tombstone, which marks its
chunks too until it is older than the grace time, so that uploads and fetches that rely on them can finish.
Unmarked chunks that were last written before the cutoff are garbage. The plan may be old when it is carried
out, so the marks are read again before each batch, and the age of each object just before it is deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from dumont.errors import DataLoss, DumontError, FailedPrecondition, NotFound
from snapshotd.failpoints import Failpoints
from snapshotd.repository import document
from snapshotd.repository.model import ObjectInfo, PrunePlan, PruneResult
from snapshotd.repository.object_keys import (
    CHUNKS,
    DAMAGED,
    DELETED,
    SNAPSHOTS,
    TEMPORARY,
    chunk_of,
    snapshot_of,
)
from snapshotd.repository.ports import ObjectStore
from snapshotd.repository.workers import Workers

BATCH = 64

# Finds the chunks that this process relies on at the moment.
Pins = Callable[[], frozenset[str]]


@dataclass
class Marks:
    """The chunks that documents in the store name. Each document is read once."""

    objects: ObjectStore
    _read: dict[ObjectInfo, frozenset[str]] = field(default_factory=dict)

    async def named(self, cutoff: datetime | None) -> frozenset[str]:
        """The chunks that snapshots name, including those deleted after ``cutoff``, unless that is None.

        Raises:
            FailedPrecondition: GC_BLOCKED, a manifest cannot be read, so it is unknown which chunks it names.
        """
        # Tombstones are listed second, so that they include a snapshot that is deleted in between.
        documents = [item async for item in self.objects.list(SNAPSHOTS) if snapshot_of(item.key)]
        if cutoff is not None:
            documents += [item async for item in self.objects.list(DELETED) if item.modified > cutoff]
        self._read = {item: await self._chunks(item) for item in documents}
        return frozenset().union(*self._read.values())

    async def _chunks(self, item: ObjectInfo) -> frozenset[str]:
        if item in self._read:
            return self._read[item]
        try:
            return document.named_chunks(await self.objects.get(item.key, document.LARGEST))
        except NotFound as error:
            # It may have been deleted since it was listed. A store that lists it but does not return it is
            # broken.
            if await self.objects.stat(item.key) is None:
                return frozenset()
            raise _blocked(item.key, error) from error
        except DataLoss as error:
            raise _blocked(item.key, error) from error


def _blocked(key: str, error: DumontError) -> FailedPrecondition:
    snapshot = snapshot_of(key)
    # A tombstone expires on its own.
    remedy = f"delete snapshots/{snapshot} first" if snapshot else "try again after the grace time"
    return FailedPrecondition(
        "GC_BLOCKED",
        f"{key} cannot be read, so it is unknown which chunks it needs and nothing is deleted; {remedy} "
        f"({error.message})",
        metadata={"key": key},
    )


async def plan(objects: ObjectStore, cutoff: datetime, pins: Pins) -> PrunePlan:
    """Find the garbage. Changes nothing."""
    marked = await Marks(objects).named(cutoff)
    damaged = {chunk_of(item.key): item async for item in objects.list(DAMAGED)}
    garbage, kept = [], 0
    async for item in objects.list(CHUNKS):
        chunk = chunk_of(item.key)
        if item.modified > cutoff or chunk in marked or chunk in pins():
            kept += item.size
            damaged.pop(chunk, None)
        else:
            garbage.append(item)
    garbage += [item async for item in objects.list(TEMPORARY) if item.modified <= cutoff]
    # The remaining marks of damage belong to chunks that are gone.
    garbage += [item for item in damaged.values() if item.modified <= cutoff]
    tombstones = [item async for item in objects.list(DELETED) if item.modified <= cutoff]
    return PrunePlan(tuple(garbage), tuple(tombstones), kept, cutoff)


async def execute(
    plan: PrunePlan, objects: ObjectStore, workers: Workers, failpoints: Failpoints, pins: Pins
) -> PruneResult:
    """Delete what the plan names, except what has come into use since. It may be killed at any time."""
    marks = Marks(objects)
    deleted = deleted_bytes = spared = 0
    marked: frozenset[str] = frozenset()

    async def remove(item: ObjectInfo) -> None:
        nonlocal deleted, deleted_bytes, spared
        chunk = chunk_of(item.key)
        current = await objects.stat(item.key)
        if current is None:
            return
        if current.modified > plan.cutoff or chunk in marked or chunk in pins():
            spared += 1
            return
        failpoints.hit("prune.chunk")
        await objects.delete(item.key)
        failpoints.hit("prune.chunk.after")
        deleted += 1
        deleted_bytes += current.size

    for start in range(0, len(plan.garbage), BATCH):
        marked = await marks.named(plan.cutoff)
        await workers.each(plan.garbage[start : start + BATCH], remove)
    for tombstone in plan.tombstones:
        current = await objects.stat(tombstone.key)
        if current is None or current.modified > plan.cutoff:
            # The snapshot has been brought back and deleted again since.
            continue
        failpoints.hit("prune.tombstone")
        await objects.delete(tombstone.key)
        failpoints.hit("prune.tombstone.after")
    return PruneResult(deleted, deleted_bytes, spared)

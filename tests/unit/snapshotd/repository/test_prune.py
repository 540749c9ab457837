"""Garbage collection takes what nobody needs, and nothing else, whatever happens meanwhile."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from dumont.errors import AlreadyExists, DataLoss, FailedPrecondition, NotFound
from snapshotd.repository.model import CHUNK, PublishedSnapshot
from snapshotd.repository.object_keys import chunk_key
from snapshotd.repository.repository import Repository
from tests.unit.snapshotd.repository.world import (
    GRACE,
    MemoryObjects,
    a_node,
    a_signer,
    an_image,
    contents,
    noise,
)

SHARED = noise(CHUNK, 1)


async def publish(store: Repository, folder: Path, snapshot: str, *own: int) -> PublishedSnapshot:
    """A snapshot of one chunk that all share and one of its own for each number."""
    content = {"pages-1.img": SHARED + b"".join(noise(CHUNK, seed) for seed in own)}
    return await store.publish(an_image(folder / snapshot, snapshot, content), folder / snapshot)


async def collect(store: Repository) -> int:
    return (await store.prune(await store.plan_prune())).deleted


async def test_what_a_deleted_snapshot_alone_used_goes_after_the_grace(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    kept = await publish(store, tmp_path, "s1", 2)
    await publish(store, tmp_path, "s2", 3, 4)
    objects.clock.advance(2 * GRACE)
    await store.delete("s2")
    assert await collect(store) == 0

    objects.clock.advance(GRACE + timedelta(seconds=1))
    plan = await store.plan_prune()
    assert len(plan.garbage) == 2
    assert plan.garbage_bytes == sum(item.size for item in plan.garbage)
    assert len(plan.tombstones) == 1
    result = await store.prune(plan)

    assert (result.deleted, result.deleted_bytes, result.spared) == (2, plan.garbage_bytes, 0)
    assert len(objects.keys("chunks/")) == len(kept.chunks())
    assert objects.keys("deleted/") == set()
    await store.verify(kept)


async def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await publish(store, tmp_path, "s1", 2)
    await store.delete("s1")
    objects.clock.advance(2 * GRACE)
    before = dict(objects.objects)
    assert (await store.plan_prune()).garbage
    assert objects.objects == before


async def test_chunks_of_an_upload_in_flight_are_young_and_stay(tmp_path: Path) -> None:
    objects = MemoryObjects()
    await objects.put(chunk_key("ab" * 32), b"not named yet")
    store = a_node(objects)
    objects.clock.advance(GRACE / 2)
    assert await collect(store) == 0
    objects.clock.advance(GRACE)
    assert await collect(store) == 1


async def test_what_a_killed_writer_left_goes_when_it_is_old() -> None:
    objects = MemoryObjects()
    await objects.put("tmp/1-abc", b"half of a ch")
    store = a_node(objects)
    assert await collect(store) == 0
    objects.clock.advance(2 * GRACE)
    assert await collect(store) == 1
    assert objects.objects == {}


async def test_a_snapshot_published_after_the_plan_keeps_its_chunks(tmp_path: Path) -> None:
    objects = MemoryObjects()
    collector, writer = a_node(objects), a_node(objects)
    await publish(writer, tmp_path, "s1", 2)
    await writer.delete("s1")
    objects.clock.advance(2 * GRACE)
    plan = await collector.plan_prune()
    assert len(plan.garbage) == 2

    newer = await publish(writer, tmp_path, "s2", 2)
    result = await collector.prune(plan)

    assert (result.deleted, result.spared) == (0, 2)
    await writer.verify(newer)


async def test_what_is_named_stays_however_old_it_is_said_to_be(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await publish(store, tmp_path, "s1", 2)
    await store.delete("s1")
    # A plan of a node whose clock is ahead: to it, everything is old.
    plan = await store.plan_prune(objects.clock() + timedelta(days=9))
    newer = await publish(store, tmp_path, "s2", 2)
    assert (await store.prune(plan)).spared == 2
    await store.verify(newer)


async def test_a_snapshot_deleted_while_another_counts_on_its_chunks(tmp_path: Path) -> None:
    """s2 does not send an old chunk, because s1 names it. Then s1 is deleted before s2 is published."""
    objects = MemoryObjects()
    other = a_node(objects)
    await publish(other, tmp_path, "s1")
    objects.clock.advance(3 * GRACE)
    collected: list[int] = []

    class Interrupts(MemoryObjects):
        async def put(self, key: str, data: bytes) -> None:
            await other.delete("s1")
            collected.append(await collect(other))
            await objects.put(key, data)

    interrupting = Interrupts(objects.clock)
    interrupting.objects = objects.objects
    writer = a_node(interrupting, workers=1)
    second = await publish(writer, tmp_path, "s2", 5)

    assert collected == [0]
    await writer.verify(second)
    objects.clock.advance(2 * GRACE)
    assert await collect(other) == 0
    await writer.verify(second)


async def test_what_is_being_restored_stays(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects, workers=1)
    snapshot = await publish(store, tmp_path, "s1", 2, 3)
    taken: list[int] = []

    class Collects(MemoryObjects):
        async def get(self, key: str, limit: int) -> bytes:
            # Fetches read by way of this.
            if not taken:
                # The slowest of restores: its snapshot is deleted and the grace is over.
                taken.append(-1)
                await store.delete("s1")
                objects.clock.advance(2 * GRACE)
                taken.append(await collect(store))
            return await objects.get(key, limit)

    slow = Collects(objects.clock)
    slow.objects = objects.objects
    store.objects = slow
    (tmp_path / "into").mkdir()
    await store.fetch(snapshot, tmp_path / "into")
    assert taken == [-1, 0]
    assert len(contents(tmp_path / "into")["pages-1.img"]) == 3 * CHUNK
    assert await collect(store) == 3


async def test_a_manifest_that_cannot_be_read_stops_it(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await publish(store, tmp_path, "s1", 2)
    objects.change("snapshots/s1/manifest", lambda data: data[:-1])
    objects.clock.advance(2 * GRACE)
    with pytest.raises(FailedPrecondition) as refusal:
        await store.plan_prune()
    assert refusal.value.reason == "GC_BLOCKED"
    assert "snapshots/s1/manifest" in refusal.value.message

    await store.delete("s1")
    assert await collect(store) == 2
    assert objects.objects == {}


async def test_a_manifest_of_another_version_stops_it_and_says_so(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await publish(store, tmp_path, "s1", 2)
    objects.change("snapshots/s1/manifest", lambda data: data.replace(b"snapshot 2 ", b"snapshot 1 ", 1))
    objects.clock.advance(2 * GRACE)
    with pytest.raises(FailedPrecondition, match=r"delete snapshots/s1 first.*version 1") as refusal:
        await store.plan_prune()
    assert refusal.value.reason == "GC_BLOCKED"

    await store.delete("s1")
    assert await collect(store) == 2
    assert objects.objects == {}


async def test_a_chunk_packed_in_an_earlier_way_is_sent_again_and_collected(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    first = await publish(store, tmp_path, "s1", 2)
    await store.delete("s1")
    for chunk in first.chunks():
        objects.objects[f"chunks/{chunk[:2]}/{chunk}"] = objects.objects.pop(chunk_key(chunk))

    second = await publish(store, tmp_path, "s2", 2)
    assert second.chunks() == first.chunks()
    await store.verify(second)
    objects.clock.advance(2 * GRACE)
    assert await collect(store) >= len(first.chunks())
    assert objects.keys("chunks/") == {chunk_key(chunk) for chunk in second.chunks()}


async def test_it_keeps_what_a_stranger_signed(tmp_path: Path) -> None:
    objects = MemoryObjects()
    stranger = a_node(objects, a_signer())
    theirs = await publish(stranger, tmp_path, "s1", 2)
    objects.clock.advance(2 * GRACE)
    assert await collect(a_node(objects)) == 0
    await stranger.verify(theirs)


async def test_two_collectors_at_once_do_no_harm(tmp_path: Path) -> None:
    objects = MemoryObjects()
    one, other = a_node(objects), a_node(objects)
    kept = await publish(one, tmp_path, "s1", 2)
    await publish(one, tmp_path, "s2", 3)
    await one.delete("s2")
    objects.clock.advance(2 * GRACE)
    plans = [await one.plan_prune(), await other.plan_prune()]
    assert (await one.prune(plans[0])).deleted == 1
    assert (await other.prune(plans[1])).deleted == 0
    await one.verify(kept)


async def test_a_deletion_that_was_cut_short_can_be_repeated(tmp_path: Path) -> None:
    objects, signer = MemoryObjects(), a_signer()
    await publish(a_node(objects, signer), tmp_path, "s1", 2)
    with pytest.raises(Exception, match="failpoint"):
        await a_node(objects, signer, failpoints={"delete.manifest": "error"}).delete("s1")
    store = a_node(objects, signer)
    await store.verify(await store.get("s1"))
    await store.delete("s1")
    with pytest.raises(NotFound):
        await store.get("s1")
    objects.clock.advance(2 * GRACE)
    await collect(store)
    assert objects.objects == {}


async def test_a_deleted_snapshot_comes_back_whole_until_the_grace_is_over(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await publish(store, tmp_path, "s1", 2)
    objects.clock.advance(2 * GRACE)
    await store.delete("s1")
    objects.clock.advance(GRACE - timedelta(seconds=1))
    assert await collect(store) == 0

    # While the tombstone counts, nothing that it names has gone
    assert (await store.undelete("s1")).manifest.id == "s1"
    await store.verify(await store.get("s1"))
    # And what is published counts from then on
    objects.clock.advance(2 * GRACE)
    await collect(store)
    await store.verify(await store.get("s1"))


async def test_a_snapshot_deleted_again_after_the_plan_has_its_whole_grace_time(tmp_path: Path) -> None:
    # given: a plan in which the snapshot's tombstone is to go
    objects = MemoryObjects()
    store = a_node(objects)
    await publish(store, tmp_path, "s1", 2)
    await store.delete("s1")
    objects.clock.advance(GRACE - timedelta(seconds=1))
    await store.undelete("s1")
    objects.clock.advance(timedelta(seconds=2))
    plan = await store.plan_prune()
    assert len(plan.tombstones) == 1

    # when it is deleted once more before the plan is carried out
    await store.delete("s1")
    await store.prune(plan)

    # then it can still be brought back
    assert (await store.undelete("s1")).manifest.id == "s1"


async def test_a_snapshot_deleted_too_long_ago_is_not_brought_back(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await publish(store, tmp_path, "old", 2)
    await store.delete("old")
    objects.clock.advance(GRACE + timedelta(seconds=1))
    await publish(store, tmp_path, "recent", 3)
    await store.delete("recent")
    with pytest.raises(NotFound, match="those that were: recent") as refusal:
        await store.undelete("old")
    assert refusal.value.reason == "SNAPSHOT_NOT_DELETED"


async def test_a_snapshot_is_not_brought_back_over_another_or_in_part(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await publish(store, tmp_path, "s1", 2)
    await store.delete("s1")
    await store.undelete("s1")
    with pytest.raises(AlreadyExists):
        await store.undelete("s1")
    await store.delete("s1")
    chunk = next(key for key in objects.objects if key.startswith("chunks/"))
    await objects.delete(chunk)
    with pytest.raises(DataLoss) as refusal:
        await store.undelete("s1")
    assert refusal.value.reason == "CHUNK_MISSING"
    assert await store.list() == []

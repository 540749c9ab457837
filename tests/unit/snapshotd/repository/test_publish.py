"""A snapshot in the store is whole, sent once, and only one of its name is ever published."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from dumont.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from snapshotd.repository import fetch as fetching
from snapshotd.repository.chunking import SMALL
from snapshotd.repository.model import CHUNK, PublishedSnapshot
from snapshotd.repository.repository import check_conditional_create
from tests.unit.snapshotd.repository.world import (
    CONTENT,
    GRACE,
    MemoryObjects,
    a_node,
    a_signer,
    an_image,
    fetched,
    noise,
    published,
)


async def test_what_one_node_publishes_another_fetches(tmp_path: Path) -> None:
    objects, signer = MemoryObjects(), a_signer()
    sent = await published(a_node(objects, signer), tmp_path)

    other = a_node(objects, trusts=(signer,))
    found = await other.get("s1")

    assert found == sent
    assert await other.list() == [sent]
    assert await fetched(other, found, tmp_path / "into") == CONTENT
    await other.verify(found)


async def test_its_files_come_back_private_and_with_their_holes(tmp_path: Path) -> None:
    store = a_node(MemoryObjects())
    await fetched(store, await published(store, tmp_path), tmp_path / "into")
    status = (tmp_path / "into" / "pages-1.img").stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 < status.st_size - CHUNK


async def test_equal_chunks_are_stored_once_and_holes_never(tmp_path: Path) -> None:
    objects = MemoryObjects()
    await published(a_node(objects), tmp_path)
    # inventory, the chunk that stands twice, and the short one.
    assert len(objects.keys("chunks/")) == 3
    assert len(objects.sent()) == 3


async def test_chunks_come_first_and_the_manifest_last(tmp_path: Path) -> None:
    objects = MemoryObjects()
    await published(a_node(objects), tmp_path)
    writes = [(method, key) for method, key in objects.calls if method in ("put", "create")]
    assert writes[-1] == ("create", "snapshots/s1/manifest")
    assert {method for method, _ in writes[:-1]} == {"put"}


async def test_a_second_snapshot_sends_only_what_is_new(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await published(store, tmp_path, "s1")
    objects.calls.clear()

    changed = CONTENT["pages-1.img"][:-1] + b"x"
    second = await published(store, tmp_path, "s2", {**CONTENT, "pages-1.img": changed})

    assert len(objects.sent()) == 1
    usage = await store.usage(second)
    assert usage.chunks == 3
    assert usage.unique_bytes < usage.stored_bytes
    assert usage.image_bytes == sum(map(len, CONTENT.values()))
    assert usage.data_bytes == usage.image_bytes - 2 * CHUNK


async def test_publishing_again_is_no_error_and_sends_nothing(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    manifest = an_image(tmp_path / "images")
    first = await store.publish(manifest, tmp_path / "images")
    objects.calls.clear()
    assert await store.publish(manifest, tmp_path / "images") == first
    assert objects.sent() == []


async def test_an_interrupted_upload_is_resumed_where_it_was(tmp_path: Path) -> None:
    objects, signer = MemoryObjects(), a_signer()
    content = {"pages-1.img": b"".join(noise(CHUNK, seed) for seed in range(6))}
    manifest = an_image(tmp_path / "images", content=content)

    def cut(method: str, key: str) -> None:
        if method == "put" and len(objects.keys("chunks/")) >= 3:
            raise Unavailable("STORE_UNAVAILABLE", "cut")

    objects.before = cut
    with pytest.raises(Unavailable):
        await a_node(objects, signer, workers=1).publish(manifest, tmp_path / "images")
    assert await a_node(objects, signer).list() == []
    objects.before = lambda method, key: None
    objects.calls.clear()

    again = a_node(objects, signer)
    resumed = await again.publish(manifest, tmp_path / "images")

    assert len(objects.sent()) == 3
    assert await fetched(again, resumed, tmp_path / "into") == content


async def test_of_eight_writers_of_one_name_exactly_one_wins(tmp_path: Path) -> None:
    objects = MemoryObjects()
    nodes = [a_node(objects) for _ in range(8)]
    outcomes = await asyncio.gather(
        *(
            published(node, tmp_path / str(number), "s1", {"pages-1.img": noise(1000, number)})
            for number, node in enumerate(nodes)
        ),
        return_exceptions=True,
    )
    winners = [outcome for outcome in outcomes if isinstance(outcome, PublishedSnapshot)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, AlreadyExists)]
    assert (len(winners), len(losers)) == (1, 7)
    assert {loser.reason for loser in losers} == {"SNAPSHOT_EXISTS"}
    assert await nodes[outcomes.index(winners[0])].get("s1") == winners[0]


async def test_a_create_whose_answer_was_lost_counts_as_won(tmp_path: Path) -> None:
    class LosesAnswers(MemoryObjects):
        async def create(self, key: str, data: bytes) -> None:
            await super().create(key, data)
            raise AlreadyExists("OBJECT_EXISTS", "the repetition of a call whose answer was lost")

    objects = LosesAnswers()
    store = a_node(objects)
    assert await published(store, tmp_path) == await store.get("s1")


async def test_files_that_are_not_the_manifests_are_not_published(tmp_path: Path) -> None:
    objects = MemoryObjects()
    manifest = an_image(tmp_path / "images")
    with (tmp_path / "images" / "pages-1.img").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataLoss) as refusal:
        await a_node(objects).publish(manifest, tmp_path / "images")
    assert refusal.value.reason == "IMAGE_DAMAGED"
    assert objects.objects == {}


async def test_progress_counts_every_byte_once_and_in_order(tmp_path: Path) -> None:
    store = a_node(MemoryObjects())
    manifest = an_image(tmp_path / "images")
    up: list[tuple[int, int]] = []
    down: list[tuple[int, int]] = []
    snapshot = await store.publish(
        manifest, tmp_path / "images", lambda done, total: up.append((done, total))
    )
    (tmp_path / "into").mkdir()
    await store.fetch(snapshot, tmp_path / "into", lambda done, total: down.append((done, total)))
    for steps, total in ((up, snapshot.size), (down, snapshot.data_size)):
        assert steps == sorted(steps)
        assert steps[0] == (0, total)
        assert steps[-1] == (total, total)


async def test_no_more_chunks_are_in_flight_than_workers(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects, workers=3)
    content = {f"f-{number}.img": noise(SMALL, number) for number in range(60)}
    await fetched(store, await published(store, tmp_path, content=content), tmp_path / "into")
    assert objects.most_in_flight == 3


async def test_cancelling_an_upload_publishes_nothing(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    under_way = asyncio.Event()
    objects.before = lambda method, key: under_way.set() if method == "put" else None
    task = asyncio.create_task(published(store, tmp_path))
    await under_way.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.list() == []


async def test_a_manifest_does_not_appear_after_its_upload_was_cancelled(tmp_path: Path) -> None:
    creating, may_end = asyncio.Event(), asyncio.Event()

    class Slow(MemoryObjects):
        async def create(self, key: str, data: bytes) -> None:
            creating.set()
            await may_end.wait()
            await super().create(key, data)

    store = a_node(Slow())
    task = asyncio.create_task(published(store, tmp_path))
    await creating.wait()
    task.cancel()
    asyncio.get_running_loop().call_soon(may_end.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    # It went through, so it is there to be deleted, and stays deleted.
    await store.delete("s1")
    assert await store.list() == []


async def test_a_deleted_snapshot_is_gone_at_once(tmp_path: Path) -> None:
    store = a_node(MemoryObjects())
    await published(store, tmp_path)
    await store.delete("s1")
    assert await store.list() == []
    for call in (store.get, store.delete):
        with pytest.raises(NotFound) as refusal:
            await call("s1")
        assert refusal.value.reason == "SNAPSHOT_NOT_FOUND"


async def test_a_full_disk_is_seen_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    snapshot = await published(store, tmp_path)
    monkeypatch.setattr(fetching, "ROOM_TO_SPARE", 1 << 60)
    objects.calls.clear()
    with pytest.raises(ResourceExhausted) as refusal:
        await fetched(store, snapshot, tmp_path / "into")
    assert refusal.value.reason == "DISK_FULL"
    assert objects.calls == []


async def test_it_fetches_into_an_empty_directory_only(tmp_path: Path) -> None:
    store = a_node(MemoryObjects())
    snapshot = await published(store, tmp_path)
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "pages-1.img").symlink_to("/etc/hostname")
    with pytest.raises(FailedPrecondition):
        await store.fetch(snapshot, tmp_path / "into")


async def test_a_chunk_nobody_names_any_more_is_sent_again_when_it_is_old(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects)
    await published(store, tmp_path, "s1")
    await store.delete("s1")
    # Old enough that garbage collection might be about to take it.
    objects.clock.advance(GRACE)
    objects.calls.clear()
    await published(store, tmp_path, "s2")
    assert len(objects.sent()) == 3


async def test_a_chunk_that_vanishes_while_it_is_written_again_is_put_back(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects, workers=1)
    await published(store, tmp_path, "s1")
    await store.delete("s1")
    objects.clock.advance(GRACE)
    puts: list[str] = []

    def collector(method: str, key: str) -> None:
        # Another node's collector had decided just before the chunk was written again.
        if method == "put":
            puts.append(key)
            if len(puts) == 2:
                objects.objects.pop(puts[0])

    objects.before = collector
    snapshot = await published(store, tmp_path, "s2")
    assert await fetched(store, snapshot, tmp_path / "into") == CONTENT


async def test_an_upload_slower_than_the_grace_looks_again_before_it_publishes(tmp_path: Path) -> None:
    objects = MemoryObjects()
    store = a_node(objects, workers=1)

    def slow(method: str, key: str) -> None:
        if method == "put":
            objects.clock.advance(timedelta(hours=3))
            for lost in objects.keys("chunks/"):
                objects.objects.pop(lost)
            if len(objects.sent()) > 3:
                objects.before = lambda method, key: None

    objects.before = slow
    snapshot = await published(store, tmp_path)
    assert len(objects.sent()) > 3
    assert snapshot.chunks()


async def test_a_store_without_conditional_create_is_refused() -> None:
    class Overwrites(MemoryObjects):
        async def create(self, key: str, data: bytes) -> None:
            await self.put(key, data)

    objects = Overwrites()
    with pytest.raises(FailedPrecondition) as refusal:
        await check_conditional_create(objects)
    assert refusal.value.reason == "STORE_NOT_CONDITIONAL"
    assert objects.objects == {}
    good = MemoryObjects()
    await check_conditional_create(good)
    assert good.objects == {}


async def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    """Chunks are dropped as they are stored, so only those in flight are held."""

    class Sink(MemoryObjects):
        alive = most = 0

        async def put(self, key: str, data: bytes) -> None:
            self.alive += len(data)
            self.most = max(self.most, self.alive)
            await super().put(key, b"")
            self.alive -= len(data)

    objects = Sink()
    folder = tmp_path / "images"
    manifest = an_image(folder, content={"pages-1.img": b""})
    with (folder / "pages-1.img").open("wb") as file:
        for number in range(24):
            file.write(os.urandom(CHUNK) if number % 2 else bytes(CHUNK))
    file_size = (folder / "pages-1.img").stat().st_size
    manifest = replace(manifest, files=(replace(manifest.files[0], size=file_size),))
    await a_node(objects, workers=3).publish(manifest, folder)
    assert 0 < objects.most <= 3 * (CHUNK + 64)

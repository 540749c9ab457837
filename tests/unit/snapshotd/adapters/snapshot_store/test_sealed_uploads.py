"""Uploads of encrypted snapshots: in memory one at a time, and only while the store can take them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dumont.errors import ResourceExhausted, Unavailable
from snapshotd.adapters.snapshot_store.sealed import SealedStore
from snapshotd.failpoints import Failpoints
from snapshotd.model import Snapshot
from snapshotd.snapshots.upload_journal import UploadJournal
from snapshotd.snapshots.uploads import Uploads
from tests.unit.snapshotd.adapters.snapshot_store.sealed_world import SealedNode
from tests.unit.snapshotd.repository.world import MemoryObjects, a_node, noise
from tests.unit.snapshotd.test_manifest import a_manifest


@pytest.fixture
def node(tmp_path: Path) -> SealedNode:
    return SealedNode(tmp_path)


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects()


async def capture(store: SealedStore, snapshot: str) -> Snapshot:
    (await store.stage(snapshot) / "pages-1.img").write_bytes(noise(100_000, 1))
    return await store.commit(a_manifest(id=snapshot, files=tuple(await store.digest(snapshot))))


def uploads_of(store: SealedStore, objects: MemoryObjects, folder: Path) -> Uploads:
    journal = UploadJournal(folder / "uploads")
    journal.open()
    return Uploads(store, a_node(objects), journal, lambda _: None, retry_seconds=0.001)


async def test_while_the_store_is_down_nothing_is_decrypted_for_it(
    node: SealedNode, objects: MemoryObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a store that is down when it is asked for the second and third time
    store = node.open()
    snapshot = await capture(store, "s1")
    uploads = uploads_of(store, objects, tmp_path)
    await uploads._check_store()
    asked, had = [], []

    def down(method: str, key: str) -> None:
        asked.append(method)
        if len(asked) <= 2:
            raise Unavailable("STORE_UNAVAILABLE", "down")

    images = store.images

    async def counted(of: Snapshot) -> Path:
        had.append(len(asked))
        return await images(of)

    objects.before = down
    monkeypatch.setattr(store, "images", counted)

    # when
    await uploads.publish(snapshot, lambda done, total: None)

    # then: its files were had once, after the store had answered
    assert len(had) == 1
    assert had[0] > 2


async def test_several_are_in_memory_one_after_the_other(
    node: SealedNode, objects: MemoryObjects, tmp_path: Path
) -> None:
    store = node.open()
    snapshots = [await capture(store, name) for name in ("s1", "s2", "s3")]
    uploads = uploads_of(store, objects, tmp_path)
    seen: list[list[str]] = []
    objects.before = lambda method, key: seen.append(node.plain())

    await asyncio.gather(*(uploads.publish(one, lambda done, total: None) for one in snapshots))

    assert max(map(len, seen)) == 1
    assert {name.removeprefix(".staged-") for plain in seen for name in plain} == {"s1", "s2", "s3"}


async def test_a_seal_that_is_cancelled_leaves_nothing(node: SealedNode) -> None:
    # given: somebody who gives up when the first chunk is on the disk
    class Watched(Failpoints):
        def hit(self, point: str) -> None:
            if point == "upload.chunk.after":
                committing.cancel()

    store = node.open(Watched())
    committing = asyncio.create_task(capture(store, "s1"))
    with pytest.raises(asyncio.CancelledError):
        await committing
    await store.discard("s1")

    assert await store.list() == []
    assert list(node.disk.iterdir()) == list(node.memory.iterdir()) == []


async def test_a_full_disk_is_named_as_such(node: SealedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> None:
        raise ResourceExhausted("STORE_FULL", "the store's disk is full")

    monkeypatch.setattr("snapshotd.repository.repository.Repository.publish", full)
    with pytest.raises(ResourceExhausted) as refused:
        await capture(node.open(), "s1")
    assert refused.value.reason == "DISK_FULL"
    assert str(node.disk) in refused.value.message


async def test_the_next_daemon_keeps_nothing_of_a_snapshot_that_was_deleted_while_it_was_mapped(
    node: SealedNode,
) -> None:
    # given
    first = node.open()
    first.pin("instance", "s1")
    await first.images(await capture(first, "s1"))
    await first.delete("s1")

    # when: another of its id is made under the next
    second = node.open(instance="s1")
    await capture(second, "s1")

    # then
    assert node.plain() == []

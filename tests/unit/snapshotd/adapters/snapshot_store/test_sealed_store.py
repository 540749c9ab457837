"""Encrypted snapshots: what is in memory and for how long, what is never on the disk, what is refused."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from dumont.errors import (
    DataLoss,
    DumontError,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from snapshotd.failpoints import Failpoints
from snapshotd.model import Manifest, Snapshot
from snapshotd.snapshots.upload_journal import UploadJournal
from snapshotd.snapshots.uploads import Uploads
from tests.unit.snapshotd.adapters.snapshot_store.sealed_world import (
    CONTENT,
    MARKER,
    SealedNode,
    capture,
    contents,
)
from tests.unit.snapshotd.repository.world import MemoryObjects, a_key_file, a_node, a_signer
from tests.unit.snapshotd.test_manifest import a_manifest


@pytest.fixture
def node(tmp_path: Path) -> SealedNode:
    return SealedNode(tmp_path)


def holds(folder: Path, what: bytes) -> bool:
    return any(what in path.read_bytes() for path in folder.rglob("*") if path.is_file())


# In memory while it is used


async def test_a_capture_leaves_memory_once_it_is_sealed_and_is_nowhere_in_plain(node: SealedNode) -> None:
    store = node.open()
    folder = await store.stage("s1")
    (folder / "pages-1.img").write_bytes(MARKER)
    assert holds(node.memory, MARKER)

    await store.commit(a_manifest(id="s1", files=tuple(await store.digest("s1"))))

    assert node.plain() == []
    assert len(node.sealed()) == 1
    assert not holds(node.disk, MARKER)


async def test_it_is_in_memory_from_its_first_reader_to_its_last(node: SealedNode) -> None:
    store = node.open()
    snapshot = await capture(store)

    for reader in ("one", "two"):
        store.pin(reader, "s1")
    images = await asyncio.gather(*(store.images(snapshot) for _ in range(2)))
    assert contents(images[0]) == contents(images[1]) == CONTENT
    assert node.plain() == ["s1"]

    await store.unpin("one")
    assert node.plain() == ["s1"]
    await store.unpin("two")
    assert node.plain() == []
    assert not holds(node.disk, MARKER)


async def test_what_is_fetched_for_a_restore_is_unsealed_already_and_what_is_brought_ahead_is_not(
    node: SealedNode,
) -> None:
    store = node.open()
    store.pin("one", "s1")
    await capture(store, "s1", fetched_from="a key")
    await capture(store, "s2", fetched_from="a key")
    assert node.plain() == ["s1"]


async def test_what_has_no_room_in_memory_once_it_is_sealed_is_a_snapshot_all_the_same(
    node: SealedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(manifest: Manifest, fetched_from: str) -> Snapshot:
        raise OSError(errno.ENOSPC, "full")

    store = node.open()
    store.pin("one", "s1")
    with monkeypatch.context() as patch:
        patch.setattr(store.unsealed, "commit", full)
        snapshot = await capture(store, fetched_from="a key")
    assert node.plain() == []

    assert await store.list() == [snapshot]
    assert contents(await store.images(snapshot)) == CONTENT


async def test_a_deleted_one_is_gone_from_memory_and_another_of_its_id_is_not_kept_for_the_same(
    node: SealedNode,
) -> None:
    store = node.open()
    store.pin("one", "s1")
    await store.images(await capture(store))

    await store.delete("s1")

    assert node.plain() == []
    await capture(store)
    assert node.plain() == []


async def test_without_room_in_memory_it_says_what_to_stop(
    node: SealedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = node.open()
    snapshot = await capture(store)
    monkeypatch.setattr("snapshotd.repository.fetch.ROOM_TO_SPARE", 1 << 60)
    with pytest.raises(ResourceExhausted) as refusal:
        await store.images(snapshot)
    assert refusal.value.reason == "UNSEALED_MEMORY_FULL"
    assert node.plain() == []


async def test_an_upload_has_it_in_memory_while_it_reads_and_not_while_it_waits(
    node: SealedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a store that fails once
    store, objects = node.open(), MemoryObjects()
    snapshot = await capture(store)
    journal = UploadJournal(tmp_path / "uploads")
    journal.open()
    uploads = Uploads(store, a_node(objects), journal, lambda _: None, retry_seconds=0.001)
    before, during = [], []
    get = store.get

    async def begin(name: str) -> Snapshot:
        before.append(node.plain())
        return await get(name)

    def look(method: str, key: str) -> None:
        if method == "put":
            during.append(node.plain())
            if len(during) == 1:
                raise Unavailable("STORE_UNAVAILABLE", "down")

    monkeypatch.setattr(store, "get", begin)
    objects.before = look

    # when
    await uploads.publish(snapshot, lambda done, total: None)

    # then
    assert before == [[], []]
    assert all(plain == ["s1"] for plain in during)
    assert node.plain() == []
    assert (await get("s1")).published


# The next daemon


async def test_the_next_daemon_keeps_what_instances_map_and_removes_the_rest_from_memory(
    node: SealedNode,
) -> None:
    first = node.open()
    for name in ("mapped", "read"):
        first.pin(name, name)
        await first.images(await capture(first, name))

    second = node.open(instance="mapped")

    assert node.plain() == ["mapped"]
    assert [one.manifest.id for one in await second.list()] == ["mapped", "read"]
    assert contents(await second.images(await second.get("mapped"))) == CONTENT
    await second.unpin("instance")
    assert node.plain() == []


@pytest.mark.parametrize(
    "point", ["upload.chunk", "upload.chunk.after", "upload.manifest", "upload.manifest.after"]
)
async def test_one_that_was_not_sealed_whole_is_never_listed_and_can_be_made_again(
    node: SealedNode, point: str
) -> None:
    broken = node.open(Failpoints({point: "error"}))
    with pytest.raises(DumontError) as failure:
        await capture(broken)
    assert failure.value.reason == "FAILPOINT"
    assert await broken.list() == []
    await broken.discard("s1")
    assert (node.plain(), list(node.disk.iterdir())) == ([], [])

    store = node.open()
    await capture(store)
    assert [one.manifest.id for one in await store.list()] == ["s1"]


async def test_what_a_crash_left_of_sealing_and_unsealing_is_removed(node: SealedNode) -> None:
    node.open()
    for left in (node.disk / ".staged-s1/chunks/v2/ab/abcd", node.memory / ".staged-s1/pages-1.img"):
        left.parent.mkdir(parents=True)
        left.write_bytes(MARKER)

    store = node.open()

    assert (node.plain(), list(node.disk.iterdir())) == ([], [])
    assert contents(await store.images(await capture(store))) == CONTENT


async def test_a_fetched_one_outlives_the_machine_and_says_who_signed_it(
    node: SealedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await capture(node.open(), fetched_from="a key")
    other_boot = tmp_path / "boot_id"
    other_boot.write_text("another boot\n")
    monkeypatch.setattr("snapshotd.adapters.snapshot_store.directory.BOOT_ID", other_boot)
    (snapshot,) = await node.open().list()
    assert (snapshot.signer, snapshot.published) == ("a key", True)


# What is refused


@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "swapped"])
async def test_a_damaged_chunk_is_refused_and_nothing_of_the_snapshot_stays_in_memory(
    node: SealedNode, damage: str
) -> None:
    store = node.open()
    snapshot = await capture(store)
    first, second = node.sealed()[:2]
    data = bytearray(first.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        first.write_bytes(data)
    elif damage == "short":
        first.write_bytes(data[:-1])
    elif damage == "missing":
        first.unlink()
    else:
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)

    store.pin("one", "s1")
    with pytest.raises(DataLoss) as refusal:
        await store.images(snapshot)
    assert refusal.value.reason == ("CHUNK_MISSING" if damage == "missing" else "CHUNK_DAMAGED")
    assert node.plain() == []
    with pytest.raises(DataLoss):
        await store.verify(snapshot)


async def test_a_verification_of_all_reads_the_disk_also_while_it_is_in_memory(node: SealedNode) -> None:
    store = node.open()
    snapshot = await capture(store)
    store.pin("one", "s1")
    await store.images(snapshot)
    await store.verify(snapshot, again=True)
    node.sealed()[0].unlink()

    await store.verify(snapshot)
    with pytest.raises(DataLoss) as refusal:
        await store.verify(snapshot, again=True)
    assert refusal.value.reason == "CHUNK_MISSING"


async def test_without_its_key_it_is_listed_and_refused_and_not_damaged(
    node: SealedNode, tmp_path: Path
) -> None:
    await capture(node.open())
    node.key.unlink()
    a_key_file(node.key)

    store = node.open()
    (snapshot,) = await store.list()
    for work in (store.images(snapshot), store.verify(snapshot)):
        with pytest.raises(FailedPrecondition) as refusal:
            await work
        assert refusal.value.reason == "KEY_MISSING"
    assert node.plain() == []
    assert (await store.get("s1")).quarantine_reason == ""
    await store.delete("s1")


async def test_one_that_another_node_has_sealed_is_not_read(node: SealedNode) -> None:
    await capture(node.open())
    node.signer = a_signer()
    store = node.open()
    assert await store.list() == []
    with pytest.raises(PermissionDenied) as refusal:
        await store.get("s1")
    assert refusal.value.reason == "UNTRUSTED_SIGNER"


async def test_one_under_another_name_is_refused(node: SealedNode) -> None:
    store = node.open()
    await capture(store)
    (node.disk / "s1").rename(node.disk / "s2")
    with pytest.raises(NotFound):
        await store.get("s2")
    (node.disk / "s2/snapshots/s1").rename(node.disk / "s2/snapshots/s2")
    with pytest.raises(DataLoss):
        await store.get("s2")
    assert await store.list() == []

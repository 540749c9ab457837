"""What every SnapshotStore promises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from dumont.errors import AlreadyExists, DataLoss, NotFound
from snapshotd.adapters.snapshot_store.directory import DirectoryStore
from snapshotd.adapters.snapshot_store.sealed import SealedStore
from snapshotd.model import Manifest, Snapshot
from snapshotd.ports import SnapshotStore
from tests.unit.snapshotd.adapters.snapshot_store.sealed_world import SealedNode
from tests.unit.snapshotd.repository.world import noise
from tests.unit.snapshotd.test_manifest import a_manifest

# What no compression makes smaller.
CONTENT = {"inventory.img": b"i" * 100, "pages-1.img": noise(9_000_000)}

OpenStore = Callable[[], DirectoryStore | SealedStore]


@pytest.fixture(params=["directory", "sealed"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """A function that opens the node's store, as each daemon does when it starts."""

    def open_directory() -> DirectoryStore:
        directory = DirectoryStore(tmp_path / "snapshots", threads=2)
        directory.open()
        return directory

    return open_directory if request.param == "directory" else SealedNode(tmp_path).open


@pytest.fixture
def store(open_store: OpenStore) -> SnapshotStore:
    return open_store()


async def staged(store: SnapshotStore, snapshot: str) -> Manifest:
    """Stage files and return the manifest that describes them."""
    folder = await store.stage(snapshot)
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    return a_manifest(id=snapshot, files=tuple(await store.digest(snapshot)))


async def committed(store: SnapshotStore, snapshot: str) -> Snapshot:
    return await store.commit(await staged(store, snapshot))


async def kept(store: SnapshotStore, snapshot: Snapshot) -> Path:
    """Its image files, while a reader uses them."""
    store.pin("reader", snapshot.manifest.id)
    return await store.images(snapshot)


async def test_a_snapshot_exists_from_its_commit_on(store: SnapshotStore) -> None:
    manifest = await staged(store, "s1")
    assert await store.list() == []
    with pytest.raises(NotFound):
        await store.get("s1")

    snapshot = await store.commit(manifest)

    assert await store.get("s1") == snapshot
    assert await store.list() == [snapshot]
    assert snapshot.manifest == manifest
    assert snapshot.size == sum(map(len, CONTENT.values()))


async def test_its_files_can_be_read_and_verified(store: SnapshotStore) -> None:
    snapshot = await committed(store, "s1")
    images = await kept(store, snapshot)
    assert {path.name: path.read_bytes() for path in images.glob("*.img")} == CONTENT
    await store.verify(snapshot)


async def test_they_stay_for_everybody_who_keeps_them(store: SnapshotStore) -> None:
    snapshot = await committed(store, "s1")
    images = await kept(store, snapshot)
    store.pin("another", "s1")
    assert await store.images(snapshot) == images

    await store.unpin("reader")
    await store.unpin("reader")

    assert {path.name: path.read_bytes() for path in images.glob("*.img")} == CONTENT
    await store.unpin("another")
    await store.verify(snapshot)


async def test_an_id_is_used_once(store: SnapshotStore) -> None:
    await committed(store, "s1")
    with pytest.raises(AlreadyExists) as refusal:
        await store.stage("s1")
    assert refusal.value.reason == "SNAPSHOT_EXISTS"


async def test_two_cannot_make_the_same_snapshot_at_once(store: SnapshotStore) -> None:
    await store.stage("s1")
    with pytest.raises(AlreadyExists) as refusal:
        await store.stage("s1")
    assert refusal.value.reason == "SNAPSHOT_IN_PROGRESS"


async def test_what_is_discarded_never_was(store: SnapshotStore) -> None:
    folder = await store.stage("s1")
    await store.discard("s1")
    await store.discard("s1")
    assert not folder.exists()
    assert await store.list() == []
    await committed(store, "s1")


@pytest.mark.parametrize("name", sorted(CONTENT))
@pytest.mark.parametrize("damage", ["flipped", "short", "long", "missing"])
async def test_damage_is_found_in_every_file(store: SnapshotStore, name: str, damage: str) -> None:
    snapshot = await committed(store, "s1")
    path = await kept(store, snapshot) / name
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "long":
        path.write_bytes(data + b"x")
    else:
        path.unlink()

    with pytest.raises(DataLoss) as refusal:
        await store.verify(snapshot)
    assert refusal.value.reason == "IMAGE_DAMAGED"
    assert refusal.value.metadata["file"] == name


async def test_a_file_that_was_not_written_with_it_is_found(store: SnapshotStore) -> None:
    snapshot = await committed(store, "s1")
    images = await kept(store, snapshot)
    await store.verify(snapshot)
    (images / "core-1.img").write_bytes(b"planted")

    with pytest.raises(DataLoss) as refusal:
        await store.verify(snapshot)
    assert refusal.value.metadata["file"] == "core-1.img"


async def test_damage_after_a_verification_is_found_by_the_next(store: SnapshotStore) -> None:
    snapshot = await committed(store, "s1")
    path = await kept(store, snapshot) / "inventory.img"
    await store.verify(snapshot)
    await store.verify(snapshot)
    path.write_bytes(path.read_bytes()[::-1].replace(b"i", b"j"))

    with pytest.raises(DataLoss) as refusal:
        await store.verify(snapshot)
    assert refusal.value.metadata["file"] == "inventory.img"


async def test_quarantine_keeps_it_and_says_why(store: SnapshotStore) -> None:
    await committed(store, "s1")
    await store.quarantine("s1", "it answered wrongly")
    assert (await store.get("s1")).quarantine_reason == "it answered wrongly"
    assert len(await store.list()) == 1


async def test_a_commit_that_is_cancelled_leaves_no_snapshot(store: SnapshotStore) -> None:
    commit = asyncio.create_task(store.commit(await staged(store, "s1")))
    await asyncio.sleep(0)
    commit.cancel()

    with pytest.raises(asyncio.CancelledError):
        await commit
    assert await store.list() == []
    with pytest.raises(NotFound):
        await store.get("s1")


async def test_quarantine_of_what_was_deleted_is_nothing(store: SnapshotStore) -> None:
    await committed(store, "s1")
    await store.delete("s1")
    await store.quarantine("s1", "too late")
    assert await store.list() == []


async def test_what_is_deleted_is_gone(store: SnapshotStore) -> None:
    snapshot = await committed(store, "s1")
    images = await kept(store, snapshot)
    await store.delete("s1")
    assert await store.list() == []
    assert not images.exists()
    with pytest.raises(NotFound):
        await store.delete("s1")


async def test_a_new_daemon_sees_what_was_committed_and_removes_the_rest(open_store: OpenStore) -> None:
    first = open_store()
    snapshot = await committed(first, "whole")
    unfinished = await first.stage("half")

    second = open_store()

    assert await second.list() == [snapshot]
    assert not unfinished.exists()


async def test_a_manifest_under_another_name_is_refused(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, threads=1)
    store.open()
    await committed(store, "s1")
    (tmp_path / "s1").rename(tmp_path / "s2")

    with pytest.raises(DataLoss):
        await store.get("s2")
    assert await store.list() == []


async def test_what_is_published_says_so_from_then_on(store: SnapshotStore) -> None:
    assert not (await committed(store, "s1")).published
    await store.note_published("s1")
    assert (await store.get("s1")).published
    assert [entry.published for entry in await store.entries()] == [True]


async def test_entries_tell_sizes_and_the_order_of_use(store: SnapshotStore) -> None:
    for snapshot in ("s1", "s2"):
        await committed(store, snapshot)
    await store.touch("s1")
    first, second = sorted(await store.entries(), key=lambda entry: entry.last_use)
    assert (first.snapshot, second.snapshot) == ("s2", "s1")
    assert first.size >= sum(map(len, CONTENT.values()))


async def test_a_fetched_snapshot_is_published_and_verified_already(store: SnapshotStore) -> None:
    snapshot = await store.commit(await staged(store, "s1"), fetched_from="a key")
    assert (snapshot.published, snapshot.signer) == (True, "a key")
    assert await store.get("s1") == snapshot
    await store.verify(snapshot)


async def test_verifying_again_reads_what_was_found_right_before(store: SnapshotStore) -> None:
    snapshot = await committed(store, "s1")
    images = await kept(store, snapshot)
    await store.verify(snapshot)
    await store.verify(snapshot, again=True)
    (images / "inventory.img").write_bytes(b"x" * 100)
    with pytest.raises(DataLoss):
        await store.verify(snapshot, again=True)


async def test_what_was_fetched_before_the_machine_started_is_removed_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = DirectoryStore(tmp_path / "snapshots", threads=1)
    directory.open()
    await directory.commit(await staged(directory, "fetched"), fetched_from="a key")
    await committed(directory, "captured")

    directory.open()
    assert [snapshot.signer for snapshot in await directory.list()] == ["", "a key"]
    again = DirectoryStore(tmp_path / "snapshots", threads=1)
    again.open()
    assert [snapshot.signer for snapshot in await again.list()] == ["", "a key"]

    other_boot = tmp_path / "boot_id"
    other_boot.write_text("another boot\n")
    monkeypatch.setattr("snapshotd.adapters.snapshot_store.directory.BOOT_ID", other_boot)
    after = DirectoryStore(tmp_path / "snapshots", threads=1)
    after.open()
    assert [snapshot.manifest.id for snapshot in await after.list()] == ["captured"]


async def test_what_does_not_say_who_signed_it_is_removed(tmp_path: Path) -> None:
    directory = DirectoryStore(tmp_path / "snapshots", threads=1)
    directory.open()
    await directory.commit(await staged(directory, "fetched"), fetched_from="a key")
    mark = tmp_path / "snapshots/fetched/fetched"
    mark.write_text(mark.read_text().partition("\n")[0] + "\n")

    after = DirectoryStore(tmp_path / "snapshots", threads=1)
    after.open()
    assert await after.list() == []

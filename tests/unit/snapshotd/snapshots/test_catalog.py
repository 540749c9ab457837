"""A node's own snapshots and those of its store: found, fetched, uploaded, deleted, let go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dumont.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from snapshotd.adapters.snapshot_store.directory import DirectoryStore
from snapshotd.model import Snapshot
from snapshotd.repository.model import CHUNK
from snapshotd.repository.repository import Repository
from snapshotd.repository.signing import Signer
from snapshotd.snapshots.catalog import Remote, Snapshots
from snapshotd.snapshots.upload_journal import UploadJournal
from snapshotd.snapshots.uploads import Uploads
from tests.unit.snapshotd.repository.world import CONTENT, MemoryObjects, a_node, a_signer
from tests.unit.snapshotd.test_manifest import a_manifest


class World:
    """Nodes with directories of their own and one store in memory; they trust one signer, each other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = MemoryObjects()
        self.signer = a_signer()
        self.pinned: Counter[str] = Counter()
        self.nodes: list[Snapshots] = []

    def mapped(self) -> frozenset[str]:
        return frozenset()

    def node(
        self, name: str, budget: int = 0, signer: Signer | None = None, trusts: tuple[Signer, ...] = ()
    ) -> Snapshots:
        """A node as it starts; one of the same name finds what the one before it left."""
        folder = self.root / name
        for part in ("damaged", "uploads"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        store = DirectoryStore(folder / "snapshots", threads=1)
        store.open()
        repository: Repository = a_node(self.objects, signer or self.signer, trusts=trusts)
        uploads = Uploads(
            store, repository, UploadJournal(folder / "uploads"), lambda _: None, retry_seconds=0.001
        )
        made = Snapshots(store, Remote(repository, uploads), folder / "damaged", budget, self)
        self.nodes.append(made)
        return made

    async def capture(self, node: Snapshots, snapshot: str = "s1", **facts: Any) -> Snapshot:
        folder = await node.store.stage(snapshot)
        for name, data in CONTENT.items():
            (folder / name).write_bytes(data)
        files = tuple(await node.store.digest(snapshot))
        return await node.store.commit(a_manifest(id=snapshot, files=files, **facts))

    async def published(self, snapshot: str = "s1") -> None:
        node = self.node("publisher")
        await self.capture(node, snapshot)
        await node.publish(snapshot, silent)


def silent(done: int, total: int) -> None:
    """Nobody listens."""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    for node in made.nodes:
        assert node.remote is not None
        await node.remote.uploads.close()
        node.remote.repository.close()


# Publishing


async def test_a_published_snapshot_says_so_and_is_written_down_no_longer(world: World) -> None:
    node = world.node("a")
    assert not (await world.capture(node)).published
    told: list[tuple[int, int]] = []

    found = await node.publish("s1", lambda done, total: told.append((done, total)))

    assert found.published
    assert told[-1][0] == told[-1][1] > 0
    assert list((world.root / "a/uploads").iterdir()) == []
    assert [(one.local, one.published) for one in (await node.list())[0]] == [(True, True)]


async def test_who_asks_twice_joins_the_upload_under_way(world: World) -> None:
    node = world.node("a")
    await world.capture(node)
    await asyncio.gather(node.publish("s1", silent), node.publish("s1", silent))
    assert len(world.objects.sent()) == len(set(world.objects.sent()))


async def test_the_next_daemon_resumes_what_was_written_down(world: World) -> None:
    # given: an upload that the end of the daemon has cut
    node = world.node("a")
    await world.capture(node)
    reached, go_on = asyncio.Event(), asyncio.Event()

    def stop_here(method: str, key: str) -> None:
        if method == "create" and key.startswith("snapshots/"):
            reached.set()
            raise Unavailable("STORE_UNAVAILABLE", "down")

    world.objects.before = stop_here
    waiting = asyncio.create_task(node.publish("s1", silent))
    await reached.wait()
    assert node.remote is not None
    await node.remote.uploads.close()
    with pytest.raises(Aborted) as failure:
        await waiting
    assert failure.value.reason == "UPLOAD_CANCELLED"
    sent = len(world.objects.sent())

    # when
    world.objects.before = lambda method, key: None
    after = world.node("a")
    assert after.remote is not None
    after.remote.uploads.published = lambda snapshot: go_on.set()
    after.remote.uploads.resume()
    await go_on.wait()

    # then: no chunk was sent again
    assert (await after.get("s1")).published
    assert len(world.objects.sent()) == sent
    assert list((world.root / "a/uploads").iterdir()) == []


async def test_a_store_that_fails_for_a_while_delays_an_upload(world: World) -> None:
    node = world.node("a")
    await world.capture(node)
    failures = iter(range(5))

    def fail(method: str, key: str) -> None:
        if next(failures, None) is not None:
            raise Unavailable("STORE_UNAVAILABLE", "down")

    world.objects.before = fail
    assert (await node.publish("s1", silent)).published


async def test_a_snapshot_of_another_node_under_the_id_ends_the_upload_for_good(world: World) -> None:
    await world.published()
    node = world.node("a")
    await world.capture(node, source_pause_seconds=9.0)
    with pytest.raises(AlreadyExists):
        await node.publish("s1", silent)
    assert list((world.root / "a/uploads").iterdir()) == []
    assert not (await node.get("s1")).published


async def test_a_quarantined_snapshot_is_not_published(world: World) -> None:
    node = world.node("a")
    await world.capture(node)
    await node.store.quarantine("s1", "its canary was wrong")
    with pytest.raises(FailedPrecondition) as refusal:
        await node.publish("s1", silent)
    assert refusal.value.reason == "SNAPSHOT_QUARANTINED"


# Fetching


async def test_a_node_finds_and_fetches_what_another_has_published(world: World) -> None:
    await world.published()
    node = world.node("b")
    found = await node.get("s1")
    assert (found.local, found.published) == (False, True)

    await node.fetch(found, silent)

    here = await node.get("s1")
    assert (here.local, here.published, here.digest) == (True, True, found.digest)
    images = await node.store.images(here)
    assert {name: (images / name).read_bytes() for name in CONTENT} == CONTENT


async def test_fetches_of_one_snapshot_at_once_are_one(world: World) -> None:
    await world.published()
    node = world.node("b")
    found = await node.get("s1")
    world.objects.calls.clear()
    await asyncio.gather(*(node.fetch(found, silent) for _ in range(3)))
    read = [key for method, key in world.objects.calls if method == "get" and key.startswith("chunks/")]
    assert len(read) == len(set(read))


async def test_a_fetch_that_nobody_waits_for_any_more_leaves_nothing(world: World) -> None:
    await world.published()
    node = world.node("b")
    found = await node.get("s1")
    reached = asyncio.Event()
    world.objects.before = lambda method, key: reached.set() if key.startswith("chunks/") else None
    fetch = asyncio.create_task(node.fetch(found, silent))
    await reached.wait()
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    assert list((world.root / "b/snapshots").iterdir()) == []


async def test_damage_is_remembered_for_that_very_document(world: World) -> None:
    await world.published()
    node = world.node("b")
    chunk = next(key for key in world.objects.keys("chunks/"))
    good, _ = world.objects.objects[chunk]
    world.objects.change(chunk, lambda data: data[:-1])
    with pytest.raises(DataLoss):
        await node.fetch(await node.get("s1"), silent)

    known = await node.get("s1")
    assert known.quarantine_reason.startswith("CHUNK_DAMAGED")
    with pytest.raises(FailedPrecondition):
        await node.fetch(known, silent)

    # until all of it was read and found right
    world.objects.change(chunk, lambda _: good)
    await node.verify("s1", silent)
    await node.fetch(await node.get("s1"), silent)


async def test_a_stranger_s_snapshot_is_listed_as_refused(world: World) -> None:
    await world.published()
    found, refused = await world.node("stranger", signer=a_signer()).list()
    assert found == []
    (one,) = refused
    assert one.snapshot == "s1"
    assert one.reason.startswith("UNTRUSTED_SIGNER")


async def test_what_was_fetched_is_refused_once_its_signer_is_trusted_no_longer(world: World) -> None:
    await world.published()
    own = a_signer()
    node = world.node("a", signer=own, trusts=(world.signer,))
    await node.fetch(await node.get("s1"), silent)
    assert (await node.get_exactly("s1", "")).local

    without = world.node("a", signer=own)
    for look in (without.get("s1"), without.get_exactly("s1", ""), without.verify("s1", silent)):
        with pytest.raises(PermissionDenied) as refusal:
            await look
        assert refusal.value.reason == "UNTRUSTED_SIGNER"
    found, refused = await without.list()
    assert found == []
    assert [(one.snapshot, one.reason.partition(":")[0]) for one in refused] == [("s1", "UNTRUSTED_SIGNER")]
    assert (await world.node("a", signer=own, trusts=(world.signer,)).get("s1")).local


async def test_without_an_object_store_what_was_fetched_is_refused_and_what_was_captured_is_not(
    world: World,
) -> None:
    await world.published()
    node = world.node("a")
    await node.fetch(await node.get("s1"), silent)
    await world.capture(node, "s2")
    alone = Snapshots(node.store, None, node.damaged, 0, world)
    with pytest.raises(PermissionDenied):
        await alone.get("s1")
    found, refused = await alone.list()
    assert [one.manifest.id for one in found] == ["s2"]
    assert [one.snapshot for one in refused] == ["s1"]


async def test_without_its_store_a_node_lists_what_it_holds(world: World) -> None:
    node = world.node("a")
    await world.capture(node)

    def down(method: str, key: str) -> None:
        raise Unavailable("STORE_UNAVAILABLE", "down")

    world.objects.before = down
    found, refused = await node.list()
    assert [one.manifest.id for one in found] == ["s1"]
    assert refused == []


async def test_a_store_that_never_answers_keeps_nobody_waiting_for_a_list(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = world.node("a")
    await world.capture(node)

    async def silence() -> list[object]:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    assert node.remote is not None
    monkeypatch.setattr(node.remote.repository, "list", silence)
    monkeypatch.setattr("snapshotd.snapshots.catalog.LIST_SECONDS", 0.01)
    found, _ = await node.list()
    assert [one.manifest.id for one in found] == ["s1"]


async def test_a_slow_store_keeps_its_place_in_the_list(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a node that has listed its store, and one that has not yet
    await world.published()
    known, fresh = world.node("a"), world.node("b")
    assert [one.published for one in (await known.list())[0]] == [True]

    # when: listing it takes longer than a list may wait
    told = asyncio.Event()
    for node in (known, fresh):
        assert node.remote is not None
        monkeypatch.setattr(node.remote.repository, "list", slow(node.remote.repository.list, told))
    monkeypatch.setattr("snapshotd.snapshots.catalog.LIST_SECONDS", 0.01)

    # then: what was known is not forgotten, and both say that there may be more
    assert [one.manifest.id for one in (await known.list())[0]] == ["s1"]
    assert (await fresh.list())[0] == []
    assert "0.01 s" in known.store_silence
    assert fresh.store_silence

    # and: the listing has gone on, so that the next one has it
    told.set()
    monkeypatch.setattr("snapshotd.snapshots.catalog.LIST_SECONDS", 10.0)
    assert [one.manifest.id for one in (await fresh.list())[0]] == ["s1"]
    assert fresh.store_silence == ""


async def test_a_list_has_what_was_published_before_it_was_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a listing that has read the store and has not come back yet
    node, holder = world.node("a"), world.node("b")
    assert node.remote is not None
    read, told = asyncio.Event(), asyncio.Event()
    listing = node.remote.repository.list

    async def late() -> object:
        found = await listing()
        read.set()
        await told.wait()
        return found

    monkeypatch.setattr(node.remote.repository, "list", late)
    first = asyncio.create_task(node.list())
    await read.wait()
    # when: something is published meanwhile, and somebody asks then
    await world.capture(holder)
    await holder.publish("s1", silent)
    second = asyncio.create_task(node.list())
    await asyncio.sleep(0)
    told.set()
    # then
    assert (await first)[0] == []
    assert [one.manifest.id for one in (await second)[0]] == ["s1"]


def slow(listing: Callable[[], Awaitable[object]], told: asyncio.Event) -> Callable[[], Awaitable[object]]:
    async def wait() -> object:
        await told.wait()
        return await listing()

    return wait


@pytest.mark.parametrize("part", ["image", "manifest"])
async def test_a_damaged_copy_on_the_node_does_not_hide_the_good_one_in_the_store(
    world: World, part: str
) -> None:
    # given: a node whose own copy is damaged
    await world.published()
    node = world.node("a")
    await node.fetch(await node.get("s1"), silent)
    if part == "image":
        await node.store.quarantine("s1", "IMAGE_DAMAGED: pages-1.img is not what it was")
    else:
        (world.root / "a" / "snapshots" / "s1" / "manifest.json").write_bytes(b"{")
        node = world.node("a")

    # then: it offers the one in the store
    (listed,) = (await node.list())[0]
    found = await node.get("s1")
    for one in (listed, found):
        assert (one.local, one.published, one.quarantine_reason) == (False, True, "")

    # and: that one takes the place of the damaged one
    await node.fetch(found, silent)
    again = await node.get("s1")
    assert (again.local, again.quarantine_reason) == (True, "")
    await node.store.verify(again, again=True)


async def test_one_that_answered_wrongly_is_not_fetched_again_and_again(world: World) -> None:
    await world.published()
    node = world.node("a")
    await node.fetch(await node.get("s1"), silent)
    await node.store.quarantine("s1", "its canary answered [1], not [2]")
    (listed,) = (await node.list())[0]
    assert listed.quarantine_reason
    assert (await node.get("s1")).local


@pytest.mark.parametrize("damage", ["flipped", "gone"])
async def test_damage_in_the_store_does_not_hide_the_good_copy_on_a_node_and_is_mended_from_it(
    world: World, damage: str
) -> None:
    # given: a node that holds the snapshot, and another one that finds it damaged in the store
    holder, other = world.node("a"), world.node("b")
    await world.capture(holder)
    await holder.publish("s1", silent)
    chunk = next(key for key in world.objects.objects if key.startswith("chunks/"))
    data, when = world.objects.objects.pop(chunk)
    if damage == "flipped":
        world.objects.objects[chunk] = (data[:-1] + bytes([data[-1] ^ 1]), when)
    with pytest.raises(DataLoss):
        await other.fetch(await other.get("s1"), silent)
    assert (await other.list())[0][0].quarantine_reason

    # then: the holder has it as good as before, and as one to be published
    (listed,) = (await holder.list())[0]
    assert (listed.local, listed.published, listed.quarantine_reason) == (True, False, "")

    # and: once it has published it, the other one can fetch it
    assert (await holder.publish("s1", silent)).published
    assert [one.published for one in (await holder.list())[0]] == [True]
    (mended,) = (await other.list())[0]
    assert mended.quarantine_reason == ""
    await other.fetch(await other.get("s1"), silent)
    assert (await other.get("s1")).local


async def test_another_manifest_than_the_one_wanted_is_refused(world: World) -> None:
    await world.published()
    node = world.node("b")
    digest = (await node.get("s1")).digest
    assert (await node.get_exactly("s1", digest)).digest == digest
    with pytest.raises(DataLoss) as refusal:
        await node.get_exactly("s1", "0" * 64)
    assert refusal.value.reason == "MANIFEST_REPLACED"


# Keeping


async def test_the_cache_lets_go_of_what_can_be_fetched_again(world: World) -> None:
    for snapshot in ("s1", "s2"):
        await world.published(snapshot)
    node = world.node("b", budget=3 * CHUNK)
    await node.fetch(await node.get("s1"), silent)
    await node.fetch(await node.get("s2"), silent)
    assert [one.manifest.id for one in (await node.list())[0] if one.local] == ["s2"]


@pytest.mark.parametrize("loss", ["emptied", "damaged", "silent"])
async def test_the_cache_keeps_what_the_store_has_lost(world: World, loss: str) -> None:
    # given: published snapshots on a node without room for them, and a store that has lost them meanwhile
    node = world.node("a")
    for snapshot in ("s1", "s2"):
        await world.capture(node, snapshot)
        await node.publish(snapshot, silent)
    if loss == "emptied":
        world.objects.objects.clear()
    elif loss == "damaged":
        for key in world.objects.keys("chunks/"):
            world.objects.objects[key] = (b"damaged", world.objects.objects[key][1])
        for snapshot in ("s1", "s2"):
            with pytest.raises(DataLoss):
                await node.verify(snapshot, silent)
    else:
        world.objects.before = _silent

    # when it makes room
    node.budget = 1
    await node.enforce_budget()

    # then its own copies, which are the last, stay
    assert {entry.snapshot for entry in await node.store.entries()} == {"s1", "s2"}


def _silent(method: str, key: str) -> None:
    raise Unavailable("STORE_UNAVAILABLE", "down")


async def test_the_cache_keeps_what_is_in_use_and_what_is_only_here(world: World) -> None:
    await world.published("s1")
    await world.published("s2")
    node = world.node("b", budget=3 * CHUNK)
    await node.fetch(await node.get("s1"), silent)
    world.pinned["s1"] = 1
    with pytest.raises(ResourceExhausted):
        await node.fetch(await node.get("s2"), silent)
    world.pinned.clear()
    await world.capture(node, "only-here")
    with pytest.raises(ResourceExhausted):
        await node.fetch(await node.get("s2"), silent)
    assert "only-here" in [one.manifest.id for one in await node.store.list()]


async def test_deleted_is_deleted_here_and_there(world: World) -> None:
    node = world.node("a")
    await world.capture(node)
    await node.publish("s1", silent)
    await node.delete("s1")
    with pytest.raises(NotFound):
        await node.get("s1")
    assert world.objects.keys("snapshots/") == set()
    with pytest.raises(NotFound):
        await node.delete("s1")


async def test_a_deletion_gives_up_the_upload_under_way(world: World) -> None:
    node = world.node("a")
    await world.capture(node)
    reached = asyncio.Event()

    def down(method: str, key: str) -> None:
        if method == "put":
            reached.set()
            raise Unavailable("STORE_UNAVAILABLE", "down")

    world.objects.before = down
    publishing = asyncio.create_task(node.publish("s1", silent))
    await reached.wait()

    await node.delete("s1")

    with pytest.raises(Aborted):
        await publishing
    assert world.objects.keys("snapshots/") == set()
    assert list((world.root / "a/uploads").iterdir()) == []


async def test_what_a_restore_reads_is_not_deleted(world: World) -> None:
    node = world.node("a")
    await world.capture(node)
    world.pinned["s1"] = 1
    with pytest.raises(FailedPrecondition) as refusal:
        await node.delete("s1")
    assert refusal.value.reason == "SNAPSHOT_IN_USE"
    assert await node.get("s1")


async def test_a_node_without_a_store_says_so(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "snapshots", threads=1)
    store.open()
    node = Snapshots(store, None, tmp_path, 0, World(tmp_path))
    with pytest.raises(FailedPrecondition) as refusal:
        await node.publish("s1", silent)
    assert refusal.value.reason == "OBJECT_STORE_NOT_CONFIGURED"
    with pytest.raises(NotFound):
        await node.get("s1")


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "version"),
        (lambda text: text.replace("s1", "s2"), "snapshots/s2"),
        (lambda text: text.replace("pages-1.img", "../pages-1"), "not allowed"),
        (lambda text: text.replace('"size": ', '"size": -'), "impossible"),
    ],
    ids=["cut short", "another version", "another snapshot's", "a path", "a negative size"],
)
async def test_what_is_wrong_with_a_manifest_of_this_node_is_listed(
    world: World, tamper: Callable[[str], str], said: str
) -> None:
    # Given a snapshot whose manifest somebody changed
    node = world.node("one")
    await world.capture(node)
    manifest = world.root / "one" / "snapshots" / "s1" / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(tamper(before))
    assert manifest.read_text() != before

    # When the daemon after that lists its snapshots
    found, rejected = await world.node("one").list()

    # Then it is not among them, and the list says why
    assert found == []
    assert [(one.snapshot, one.local) for one in rejected] == [("s1", True)]
    assert said in rejected[0].reason


async def test_a_published_copy_is_listed_in_place_of_a_damaged_one(world: World) -> None:
    node = world.node("one")
    await world.capture(node)
    await node.publish("s1", silent)
    (world.root / "one" / "snapshots" / "s1" / "manifest.json").write_text("{}")

    found, rejected = await world.node("one").list()

    assert [(one.manifest.id, one.local) for one in found] == [("s1", False)]
    assert rejected == []

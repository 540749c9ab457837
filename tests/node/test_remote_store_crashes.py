"""snapshotd dies at every named point of upload, fetch, commit, deletion, pruning; the next one goes on."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotd.repository.repository import Repository
from tests.contracts.store_process import collect, open_store
from tests.node.daemon import Daemon
from tests.node.store_nodes import StoreNodes, capture, delete, listed, prune, publish, restore

pytestmark = pytest.mark.node

UPLOAD = ["upload.chunk", "upload.chunk.after", "upload.manifest", "upload.manifest.after"]
FETCH = ["restore.fetch", "fetch.chunk", "fetch.chunk.after", "restore.fetch.after", "restore.verify"]
DELETE = ["delete.tombstone", "delete.manifest", "delete.manifest.after"]
PRUNE = ["prune.chunk", "prune.chunk.after", "prune.tombstone", "prune.tombstone.after"]

PRUNES_AT_ONCE = ("--store-grace-seconds", "0")
SNAPSHOTD = Path(__file__).parents[2] / "snapshotd"


def test_every_point_that_the_store_names_is_walked() -> None:
    named = {
        point
        for path in (SNAPSHOTD / "repository").glob("*.py")
        for point in re.findall(r'failpoints\.hit\("([a-z_.]+)"\)', path.read_text())
    }
    assert named
    assert named <= {*UPLOAD, *FETCH, *DELETE, *PRUNE}


@pytest.fixture(scope="module")
def nodes(
    criu: Path,
    small_model: Path,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> StoreNodes:
    """What a node and the store held at three moments of a life.

    ``captured`` has the snapshot ``one``, and nothing is published. ``published`` has published it, to
    ``bucket-published``. In ``bucket-deleted`` there is also what is left of ``two``, which was deleted.
    """
    root = tmp_path_factory.mktemp("crashes")
    made = StoreNodes(root, free_port, f"file://{root}/bucket")
    with made.node("a") as a:
        made.fill(a, small_model)
        made.copy_snapshots("a", "captured")
        publish(a)
        made.copy_snapshots("a", "published")
        shutil.copytree(root / "bucket", root / "bucket-published")
        restore(a, "second")
        capture(a, "second", "two")
        publish(a, "two")
        delete(a, "two")
    (root / "bucket").rename(root / "bucket-deleted")
    return made


@pytest.fixture
def bucket(nodes: StoreNodes) -> Iterator[Path]:
    """The store's directory, which does not exist yet."""
    yield nodes.root / "bucket"
    shutil.rmtree(nodes.root / "bucket", ignore_errors=True)
    for node in ("a-again", "b"):
        shutil.rmtree(nodes.root / node, ignore_errors=True)


@pytest.fixture
def published(nodes: StoreNodes, bucket: Path) -> None:
    """The store holds ``one``."""
    shutil.copytree(nodes.root / "bucket-published", bucket)


def as_it_was(nodes: StoreNodes, moment: str, *flags: str) -> Daemon:
    """A node that holds what the first one held then."""
    nodes.copy_snapshots(moment, "a-again")
    return nodes.node("a-again", *flags)


def repository(nodes: StoreNodes) -> Repository:
    """The store as another node sees it that trusts the first."""
    return open_store(str(nodes.root / "bucket"), nodes.root / "a" / "signing.key")


def check_all_is_well(nodes: StoreNodes) -> None:
    """Every byte of what is listed can be fetched, and after a prune nothing is there that none needs."""

    async def fetch_and_prune(store: Repository) -> None:
        for snapshot in await store.list():
            await store.verify(snapshot)
        await collect(store)
        await collect(store)

    asyncio.run(fetch_and_prune(repository(nodes)))
    bucket = nodes.root / "bucket"
    needed = {
        chunk
        for manifest in (bucket / "snapshots").glob("*/manifest")
        for chunk, _ in json.loads(manifest.read_bytes().partition(b"\n")[2])["chunks"]
    }
    assert {path.name for path in (bucket / "chunks").glob("*/*/*")} == needed
    assert [path for path in (bucket / "tmp").glob("*") if path.is_file()] == []


@pytest.mark.parametrize("point", UPLOAD)
def test_an_upload_goes_on_after_a_crash(nodes: StoreNodes, bucket: Path, point: str) -> None:
    with as_it_was(nodes, "captured") as a:
        a.crash(point, lambda: publish(a))
        assert (a.state_dir / "uploads" / "one.json").exists()

        # Nothing half-written is listed.
        there = [snapshot.manifest.id for snapshot in asyncio.run(repository(nodes).list())]
        assert there == (["one"] if point == "upload.manifest.after" else [])

        # The upload was resumed when it started; this joins it, or finds it done.
        a.start()
        assert publish(a).published
        assert not (a.state_dir / "uploads" / "one.json").exists()
        assert listed(a)["one"].published
    check_all_is_well(nodes)


@pytest.mark.parametrize("point", FETCH)
def test_a_fetch_leaves_nothing_half_there(nodes: StoreNodes, published: None, point: str) -> None:
    with nodes.node("b") as b:
        b.crash(point, lambda: restore(b, "victim"))

        b.start()
        known = listed(b)["one"]
        assert known.published
        assert known.local is (point in ("restore.fetch.after", "restore.verify"))
        assert list((b.state_dir / "snapshots").glob(".staged-*")) == []
        restore(b, "back")
        assert b.generate("back") == nodes.answer
    check_all_is_well(nodes)


@pytest.mark.parametrize("point", DELETE)
def test_a_deletion_can_be_repeated(nodes: StoreNodes, published: None, bucket: Path, point: str) -> None:
    with as_it_was(nodes, "published", *PRUNES_AT_ONCE) as a:
        a.crash(point, lambda: delete(a))

        a.start()
        assert list(listed(a)) == ["one"]
        restore(a, "back")
        a.stop_instance("back")
        delete(a)
        assert listed(a) == {}
    check_all_is_well(nodes)
    assert list((bucket / "chunks").glob("*/*/*")) == []


@pytest.mark.parametrize("point", PRUNE)
def test_a_prune_can_be_killed(nodes: StoreNodes, bucket: Path, point: str) -> None:
    # given: one snapshot stays, another was deleted
    shutil.copytree(nodes.root / "bucket-deleted", bucket)

    with as_it_was(nodes, "published", *PRUNES_AT_ONCE) as a:

        def prune_twice() -> None:
            prune(a)
            prune(a)

        a.crash(point, prune_twice)

    check_all_is_well(nodes)
    assert [snapshot.manifest.id for snapshot in asyncio.run(repository(nodes).list())] == ["one"]
    assert [path for path in (bucket / "deleted").rglob("*") if path.is_file()] == []


def test_an_upload_that_was_cut_sends_no_chunk_twice_and_serves_on_another_node(
    nodes: StoreNodes, bucket: Path
) -> None:
    with as_it_was(nodes, "captured") as a:
        a.crash("upload.manifest", lambda: publish(a))
        before = {path: path.stat().st_mtime_ns for path in (bucket / "chunks").glob("*/*/*")}
        assert len(before) > 10

        a.start()
        publish(a)
        assert {path: path.stat().st_mtime_ns for path in (bucket / "chunks").glob("*/*/*")} == before

    with nodes.node("b") as b:
        restore(b, "back")
        assert b.generate("back") == nodes.answer

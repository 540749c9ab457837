"""snapshotd dies at every named point of upload, fetch, commit, deletion, pruning; the next one goes on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from dumont.errors import Unavailable
from snapshotd.failpoints import CRASHED
from tests.node.daemon import Daemon
from tests.node.store_nodes import StoreNodes, capture, delete, listed, prune, publish, restore

pytestmark = pytest.mark.node

UPLOAD = ["upload.chunk", "upload.chunk.after", "upload.manifest", "upload.manifest.after"]
FETCH = ["restore.fetch", "fetch.chunk", "fetch.chunk.after", "restore.fetch.after", "restore.verify"]
DELETE = ["delete.tombstone", "delete.manifest", "delete.manifest.after"]
PRUNE = ["prune.chunk", "prune.chunk.after", "prune.tombstone", "prune.tombstone.after"]

SNAPSHOTD = Path(__file__).parents[2] / "snapshotd"


def test_every_point_that_the_store_names_is_walked() -> None:
    named = {
        point
        for path in (SNAPSHOTD / "store").glob("*.py")
        for point in re.findall(r'failpoints\.hit\("([a-z_.]+)"\)', path.read_text())
    }
    assert named
    assert named <= {*UPLOAD, *FETCH, *DELETE, *PRUNE}


@pytest.fixture(scope="module")
def nodes(
    criu: Path,
    instruct_model: Path,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> StoreNodes:
    """Node ``a`` has captured one snapshot, and nothing is published."""
    root = tmp_path_factory.mktemp("crashes")
    made = StoreNodes(root, free_port, f"file://{root}/bucket")
    with made.node("a") as a:
        made.fill(a, instruct_model)
    return made


@pytest.fixture
def a(nodes: StoreNodes) -> Iterator[str]:
    """The name of a node as ``a`` was before anything was published, with an empty store."""
    shutil.rmtree(nodes.root / "bucket", ignore_errors=True)
    nodes.copy_snapshots("a", "a-again")
    yield "a-again"
    shutil.rmtree(nodes.root / "a-again")
    shutil.rmtree(nodes.root / "b", ignore_errors=True)


@pytest.fixture
def published(nodes: StoreNodes, a: str) -> str:
    """The same, and the snapshot is published."""
    with nodes.node(a) as daemon:
        publish(daemon)
    return a


def crash(daemon: Daemon, work: Callable[[], object]) -> None:
    """Do what makes the daemon reach its failpoint, and see it end there."""
    daemon.start()
    process = daemon.process
    assert process is not None
    with pytest.raises((grpc.RpcError, Unavailable)):
        work()
    assert process.wait(timeout=30) == CRASHED
    daemon.process = None
    daemon.channel.close()
    daemon.output.close()


def check_all_is_well(nodes: StoreNodes) -> None:
    """Every listed snapshot restores on a new node, and after a prune nothing is there that none needs."""
    with nodes.node("b", "--store-grace-seconds", "0") as b:
        for snapshot in listed(b):
            restore(b, f"from-{snapshot}", snapshot)
            assert b.generate(f"from-{snapshot}") == nodes.answer
        prune(b)
        prune(b)
    bucket = nodes.root / "bucket"
    needed = {
        chunk
        for manifest in (bucket / "snapshots").glob("*/manifest")
        for chunk, _ in json.loads(manifest.read_bytes().partition(b"\n")[2])["chunks"]
    }
    assert {path.name for path in (bucket / "chunks").glob("*/*/*")} == needed
    assert [path for path in (bucket / "tmp").glob("*") if path.is_file()] == []


@pytest.mark.parametrize("point", UPLOAD)
def test_an_upload_goes_on_after_a_crash(nodes: StoreNodes, a: str, point: str) -> None:
    daemon = nodes.node(a, "--failpoints", f"{point}=exit")
    crash(daemon, lambda: publish(daemon))
    assert (nodes.root / a / "uploads" / "one.json").exists()

    # Nothing half-written is listed.
    with nodes.node("b") as b:
        assert list(listed(b)) == (["one"] if point == "upload.manifest.after" else [])
    shutil.rmtree(nodes.root / "b")

    with nodes.node(a) as again:
        # The upload was resumed when it started; this joins it, or finds it done.
        assert publish(again).published
        assert not (nodes.root / a / "uploads" / "one.json").exists()
        assert listed(again)["one"].published
    check_all_is_well(nodes)


@pytest.mark.parametrize("point", FETCH)
def test_a_fetch_leaves_nothing_half_there(nodes: StoreNodes, published: str, point: str) -> None:
    daemon = nodes.node("b", "--failpoints", f"{point}=exit")
    crash(daemon, lambda: restore(daemon, "victim"))

    with nodes.node("b") as b:
        known = listed(b)["one"]
        assert known.published
        assert known.local is (point in ("restore.fetch.after", "restore.verify"))
        assert list((nodes.root / "b/snapshots").glob(".staged-*")) == []
        restore(b, "back")
        assert b.generate("back") == nodes.answer
    shutil.rmtree(nodes.root / "b")
    check_all_is_well(nodes)


@pytest.mark.parametrize("point", DELETE)
def test_a_deletion_can_be_repeated(nodes: StoreNodes, published: str, point: str) -> None:
    daemon = nodes.node(published, "--failpoints", f"{point}=exit")
    crash(daemon, lambda: delete(daemon))

    with nodes.node(published, "--store-grace-seconds", "0") as again:
        assert list(listed(again)) == ["one"]
        restore(again, "back")
        again.stop_instance("back")
        delete(again)
        assert listed(again) == {}
    check_all_is_well(nodes)
    assert list((nodes.root / "bucket" / "chunks").glob("*/*/*")) == []


@pytest.mark.parametrize("point", PRUNE)
def test_a_prune_can_be_killed(nodes: StoreNodes, published: str, instruct_model: Path, point: str) -> None:
    # given: one snapshot stays, another was deleted
    with nodes.node(published) as daemon:
        restore(daemon, "source")
        capture(daemon, snapshot="two")
        publish(daemon, "two")
        delete(daemon, "two")

    daemon = nodes.node(published, "--store-grace-seconds", "0", "--failpoints", f"{point}=exit")

    def prune_twice() -> None:
        prune(daemon)
        prune(daemon)

    crash(daemon, prune_twice)

    check_all_is_well(nodes)
    assert [path for path in (nodes.root / "bucket" / "deleted").rglob("*") if path.is_file()] == []


def test_an_upload_that_was_cut_sends_no_chunk_twice(nodes: StoreNodes, a: str) -> None:
    daemon = nodes.node(a, "--failpoints", "upload.manifest=exit")
    crash(daemon, lambda: publish(daemon))
    before = {path: path.stat().st_mtime_ns for path in (nodes.root / "bucket/chunks").glob("*/*/*")}
    assert len(before) > 10

    with nodes.node(a) as again:
        publish(again)

    assert {path: path.stat().st_mtime_ns for path in (nodes.root / "bucket/chunks").glob("*/*/*")} == before

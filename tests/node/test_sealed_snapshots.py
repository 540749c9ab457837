"""Snapshots that are encrypted on the node as well: they are readable only while they are in use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotd.system.mounts import UNSEALED_SOURCE
from snapshotd.system.tmpfs import Tmpfs
from tests.node.daemon import Daemon
from tests.node.markers import readable
from tests.node.store_nodes import (
    StoreNodes,
    capture,
    delete,
    instances,
    listed,
    publish,
    refused,
    restore,
    verify,
)
from tests.unit.snapshotd.repository.world import a_key_file

pytestmark = pytest.mark.node

SEALING = [
    "capture.commit",
    "upload.chunk.after",
    "upload.manifest",
    "upload.manifest.after",
    "capture.commit.after",
]
UNSEALING = [
    "fetch.chunk",
    "fetch.chunk.after",
    "restore.verify.after",
    "restore.criu.after",
    "restore.serve",
]


@pytest.fixture(scope="module")
def marker() -> Iterator[bytes]:
    """What model hosts that start now hold in their memory."""
    text = f"marker-{os.urandom(16).hex()}"
    patch = pytest.MonkeyPatch()
    patch.setenv("LD_LIBRARY_PATH", f"/nonexistent/{text}")
    yield text.encode()
    patch.undo()


@pytest.fixture(scope="module")
def nodes(
    criu: Path,
    small_model: Path,
    marker: bytes,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> StoreNodes:
    """Node ``a`` holds the encrypted snapshot ``one``, and nothing is published."""
    root = tmp_path_factory.mktemp("sealed")
    made = StoreNodes(root, free_port, f"file://{root}/bucket")
    a_key_file(root / "key")
    with sealed(made, "a") as a:
        made.fill(a, small_model)
    return made


@pytest.fixture(scope="module")
def shared(nodes: StoreNodes) -> Iterator[Daemon]:
    """Node ``a`` itself."""
    with sealed(nodes, "a") as daemon:
        yield daemon


@pytest.fixture
def a(shared: Daemon) -> Iterator[Daemon]:
    """Node ``a``, running, for tests that leave it the snapshot ``one`` as it was, and no other."""
    if shared.process is None:
        shared.start()
    yield shared
    for instance in instances(shared):
        shared.stop_instance(instance)


@pytest.fixture
def own(nodes: StoreNodes) -> Iterator[Daemon]:
    """A node that holds what ``a`` does and can be changed for good."""
    nodes.copy_snapshots("a", "own")
    with sealed(nodes, "own") as daemon:
        yield daemon
    shutil.rmtree(nodes.root / "own")
    shutil.rmtree(nodes.root / "bucket", ignore_errors=True)


def sealed(nodes: StoreNodes, name: str, key: str = "key") -> Daemon:
    return nodes.node(name, "--encrypt-local", "--encryption-key-file", str(nodes.root / key))


def unsealed(daemon: Daemon) -> list[str]:
    """The snapshots whose image files are in memory."""
    memory = daemon.state_dir / "unsealed"
    assert Tmpfs(UNSEALED_SOURCE, memory).mounted()
    return sorted(path.name for path in memory.iterdir())


def test_a_marker_in_a_model_host_s_memory_is_readable_nowhere_once_it_is_captured(
    nodes: StoreNodes, marker: bytes, small_model: Path
) -> None:
    # given: a node that does not encrypt, where the search finds it, in compressed chunks as well
    with nodes.node("plain") as plain:
        plain.start_instance("source", small_model)
        capture(plain)
        assert readable(nodes.root / "plain", marker) == ["snapshots"]
        publish(plain)
        assert readable(nodes.root / "bucket", marker) == ["chunks"]
    shutil.rmtree(nodes.root / "bucket")

    # when: captured, and its instance goes on
    with sealed(nodes, "b") as b:
        b.start_instance("source", small_model)
        capture(b)
        assert b.generate("source") == nodes.answer

        # then
        assert readable(nodes.root / "b", marker) == []
        assert unsealed(b) == []
        assert listed(b)["one"].local

        # nor when it is published
        publish(b)
        assert readable(nodes.root / "b", marker) == []
        assert listed(b)["one"].published
    assert list((nodes.root / "bucket").rglob("chunks/*/*/*"))
    assert readable(nodes.root / "bucket", marker) == []
    shutil.rmtree(nodes.root / "bucket")


def test_it_is_in_memory_for_as_long_as_an_instance_maps_it(
    nodes: StoreNodes, marker: bytes, a: Daemon
) -> None:
    restore(a, "one")
    restore(a, "two")

    assert a.generate("one") == a.generate("two") == nodes.answer
    assert unsealed(a) == ["one"]
    assert readable(a.state_dir, marker) == ["unsealed"]

    a.stop_instance("one")
    assert unsealed(a) == ["one"]
    assert a.generate("two") == nodes.answer
    a.stop_instance("two")
    assert unsealed(a) == []
    assert readable(a.state_dir, marker) == []


def test_an_instance_goes_on_under_the_next_daemon_and_can_be_captured_there(
    nodes: StoreNodes, marker: bytes, a: Daemon
) -> None:
    # given: one that will have served somebody, and one that is as it was captured
    restore(a, "survivor")
    restore(a, "clone")

    # when
    a.kill()
    a.start()

    # then
    assert a.generate("survivor") == nodes.answer
    assert unsealed(a) == ["one"]
    capture(a, "clone", "two")
    for instance in ("survivor", "clone"):
        a.stop_instance(instance)
    assert readable(a.state_dir, marker) == []

    restore(a, "back", "two")
    assert a.generate("back") == nodes.answer
    a.stop_instance("back")
    delete(a, "two")


def test_the_memory_is_root_s_alone_never_swapped_and_given_back_at_exit(
    nodes: StoreNodes, a: Daemon
) -> None:
    memory = a.state_dir / "unsealed"
    assert memory.stat().st_mode & 0o777 == 0o700
    (mount,) = [line for line in Path("/proc/mounts").read_text().splitlines() if f" {memory} " in line]
    assert (
        "noswap" in mount.split()[3].split(",") or "cannot keep unsealed snapshots out of the swap" in a.log()
    )

    restore(a, "one")
    assert a.terminate() == 0
    assert not Tmpfs(UNSEALED_SOURCE, a.state_dir / "unsealed").mounted()
    a.start()
    assert unsealed(a) == []


def test_with_another_key_it_is_refused_before_criu_is_called(
    nodes: StoreNodes, marker: bytes, a: Daemon
) -> None:
    a.terminate()
    a_key_file(nodes.root / "another-key")
    with sealed(nodes, "a", "another-key") as other:
        assert listed(other)["one"].local
        refusal = refused(other, "victim")
        assert (refusal.reason, refusal.metadata["step"]) == ("KEY_MISSING", "restore.verify")
        assert unsealed(other) == []

    # and with its own it serves
    a.start()
    restore(a, "back")
    assert a.generate("back") == nodes.answer


def test_a_damaged_chunk_is_refused_before_criu_is_called_and_the_snapshot_quarantined(
    nodes: StoreNodes, own: Daemon
) -> None:
    verify(own)
    chunk = max(
        (own.state_dir / "snapshots/.sealed/one/chunks").rglob("*/*/*"), key=lambda path: path.stat().st_size
    )
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    # Not written to in place: other nodes here have the same file.
    chunk.unlink()
    chunk.write_bytes(data)

    refusal = refused(own, "victim")

    assert (refusal.reason, refusal.metadata["step"]) == ("CHUNK_DAMAGED", "restore.verify")
    assert refused(own, "again").reason == "SNAPSHOT_QUARANTINED"
    assert unsealed(own) == []


def test_a_fetched_snapshot_is_encrypted_here_as_well(nodes: StoreNodes, marker: bytes, own: Daemon) -> None:
    publish(own)
    with sealed(nodes, "c") as c:
        fetched = restore(c, "back")
        assert [phase.name for phase in fetched.phases][:3] == ["check", "fetch", "verify"]
        assert c.generate("back") == nodes.answer
        c.stop_instance("back")
        assert (unsealed(c), readable(c.state_dir, marker)) == ([], [])

        again = restore(c, "again")
        assert "fetch" not in [phase.name for phase in again.phases]
        assert c.generate("again") == nodes.answer
    shutil.rmtree(nodes.root / "c")


@pytest.mark.parametrize("point", SEALING)
def test_a_crash_while_it_is_sealed_leaves_a_whole_snapshot_or_none(
    nodes: StoreNodes, marker: bytes, a: Daemon, point: str
) -> None:
    restore(a, "source")

    a.crash(point, lambda: capture(a, "source", "two"))
    a.start()

    there = point == "capture.commit.after"
    assert sorted(listed(a)) == (["one", "two"] if there else ["one"])
    assert unsealed(a) == ["one"]
    if not there:
        capture(a, "source", "two")
    a.stop_instance("source")
    assert readable(a.state_dir, marker) == []
    restore(a, "back", "two")
    assert a.generate("back") == nodes.answer
    a.stop_instance("back")
    delete(a, "two")


@pytest.mark.parametrize("point", UNSEALING)
def test_a_crash_while_it_is_restored_leaves_nothing_in_memory(
    nodes: StoreNodes, marker: bytes, a: Daemon, point: str
) -> None:
    a.crash(point, lambda: restore(a, "victim"))
    a.start()

    assert unsealed(a) == []
    assert readable(a.state_dir, marker) == []
    restore(a, "back")
    assert a.generate("back") == nodes.answer

"""Two nodes and one bucket: what one has captured the other serves, whatever the network does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from minio import Minio

from dumont.errors import DataLoss, DumontError, ResourceExhausted
from dumont.rpc.status import from_rpc_error
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.s3_server import S3Server
from tests.node.daemon import Daemon
from tests.node.markers import readable, reads
from tests.node.store_nodes import (
    StoreNodes,
    capture,
    delete,
    listed,
    prefetch,
    prune,
    publish,
    refused,
    restore,
    verify,
)

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Iterator[S3Server]:
    """The bucket, named in the environment of the nodes."""
    os.environ.update(s3_server.environment())
    yield s3_server
    for name in s3_server.environment():
        del os.environ[name]


@pytest.fixture(scope="module")
def nodes(
    criu: Path,
    small_model: Path,
    bucket: S3Server,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> StoreNodes:
    """A snapshot that node ``a`` has captured and published; nothing else is left of ``a``."""
    made = StoreNodes(tmp_path_factory.mktemp("nodes"), free_port, f"s3://{bucket.bucket}/nodes")
    with made.node("a") as a:
        a.start_instance("source", small_model)
        captured = capture(a)
        assert (captured.local, captured.published) == (True, False)
        assert publish(a).published
        made.answer, made.digest = a.generate("source"), captured.manifest_digest
        made.trust("a")
    shutil.rmtree(made.root / "a")
    return made


@pytest.fixture
def b(nodes: StoreNodes) -> Iterator[Daemon]:
    """A node that holds nothing."""
    with nodes.node("b") as daemon:
        yield daemon
    shutil.rmtree(nodes.root / "b")


def test_a_node_that_never_saw_the_snapshot_serves_it_from_the_bucket(nodes: StoreNodes, b: Daemon) -> None:
    # given: it holds nothing and knows what is published
    known = listed(b)["one"]
    assert (known.local, known.published, known.incompatibility) == (False, True, "")
    assert known.manifest_digest == nodes.digest

    # when
    instance = restore(b, "back", digest=nodes.digest)

    # then
    assert [phase.name for phase in instance.phases][:3] == ["check", "fetch", "verify"]
    assert len(nodes.answer) > 2
    assert b.generate("back") == nodes.answer

    # and from then on it has it
    assert listed(b)["one"].local
    again = restore(b, "again", digest=nodes.digest)
    assert "fetch" not in [phase.name for phase in again.phases]
    assert b.generate("again") == nodes.answer


def test_a_prefetched_snapshot_is_restored_without_the_bucket(nodes: StoreNodes, b: Daemon) -> None:
    # given: nothing of it is here
    assert not listed(b)["one"].local

    # when
    brought = prefetch(b, digest=nodes.digest)

    # then
    assert (brought.local, brought.published) == (True, True)
    instance = restore(b, "back", digest=nodes.digest)
    assert "fetch" not in [phase.name for phase in instance.phases]
    assert b.generate("back") == nodes.answer


def test_another_manifest_than_the_one_asked_for_is_not_prefetched(b: Daemon) -> None:
    with pytest.raises(DataLoss) as refusal:
        prefetch(b, digest="0" * 64)
    assert refusal.value.reason == "MANIFEST_REPLACED"
    assert not listed(b)["one"].local


def test_what_a_snapshot_takes_is_told_and_all_of_it_can_be_verified(nodes: StoreNodes, b: Daemon) -> None:
    found = b.snapshots.GetSnapshot(snapshots_pb2.GetSnapshotRequest(name="snapshots/one"))
    stored = found.stored
    assert 0 < stored.stored_bytes == stored.unique_bytes < stored.data_bytes <= stored.image_bytes
    assert stored.chunk_count > 1
    assert not stored.encrypted

    only_there = verify(b)
    assert (only_there.local_bytes, only_there.published_bytes) == (0, stored.data_bytes)

    restore(b, "back")
    both = verify(b)
    assert (both.local_bytes, both.published_bytes) == (stored.image_bytes, stored.data_bytes)


def test_another_manifest_than_the_one_asked_for_is_refused(b: Daemon) -> None:
    error = refused(b, "victim", digest="0" * 64)
    assert isinstance(error, DataLoss)
    assert error.reason == "MANIFEST_REPLACED"


def test_a_fetched_snapshot_leaves_a_full_cache_and_comes_again(nodes: StoreNodes, small_model: Path) -> None:
    with nodes.node("small", "--cache-bytes", str(300 << 20)) as small:
        restore(small, "one")
        small.stop_instance("one")
        assert listed(small)["one"].local

        # when: another snapshot needs the room, and is published
        small.start_instance("source", small_model)
        capture(small, snapshot="two")
        publish(small, "two")
        restore(small, "two", "two")

        # then: while an instance maps the other one's memory there is no room for the first, which has left
        assert isinstance(refused(small, "one-again"), ResourceExhausted)
        assert small.generate("two") == nodes.answer

        # and once that has ended it comes again
        small.stop_instance("two")
        restore(small, "one-again")
        assert small.generate("one-again") == nodes.answer
        assert [name for name, found in listed(small).items() if found.local] == ["one"]
        delete(small, "two")


def test_deleted_here_is_deleted_everywhere_and_pruned_later(
    nodes: StoreNodes, small_model: Path, bucket: S3Server
) -> None:
    with nodes.node("c", "--store-grace-seconds", "0", store=f"s3://{bucket.bucket}/deleted") as c:
        c.start_instance("source", small_model)
        capture(c)
        publish(c)
        assert prune(c, dry_run=True).object_count == 0

        delete(c)
        assert listed(c) == {}
        would = prune(c, dry_run=True)
        assert would.object_count > 1
        assert keys(bucket, "deleted/chunks/")
        prune(c)
        prune(c)
        assert keys(bucket, "deleted/") == []


def test_nothing_of_an_encrypted_snapshot_can_be_read_without_its_key(
    nodes: StoreNodes, small_model: Path, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a model host whose memory holds a marker, and nodes with and without the key
    marker = f"marker-{os.urandom(16).hex()}".encode()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nonexistent/{marker.decode()}")
    key = nodes.root / "key"
    key.write_text(os.urandom(32).hex())
    key.chmod(0o600)
    store = f"s3://{bucket.bucket}/encrypted"
    with nodes.node("d", "--encryption-key-file", str(key), store=store) as d:
        d.start_instance("source", small_model)
        capture(d)
        assert readable(nodes.root / "d/snapshots", marker) == ["one"]
        nodes.copy_snapshots("d", "plain")
        publish(d)
        assert d.snapshots.GetSnapshot(
            snapshots_pb2.GetSnapshotRequest(name="snapshots/one")
        ).stored.encrypted
        nodes.trust("d")
    monkeypatch.delenv("LD_LIBRARY_PATH")

    # and a node that publishes the same images without a key, where the search finds it
    with nodes.node("plain", store=f"s3://{bucket.bucket}/plain") as plain:
        publish(plain)
    assert readable_keys(bucket, "plain/chunks/", marker)

    # then: it finds it nowhere in the encrypted one
    assert keys(bucket, "encrypted/chunks/")
    assert readable_keys(bucket, "encrypted/", marker) == []

    # and a node without the key refuses, one with it serves
    with nodes.node("e", store=store) as e:
        assert refused(e, "victim").reason == "KEY_MISSING"
        assert list((nodes.root / "e/snapshots").iterdir()) == []
    with nodes.node("f", "--encryption-key-file", str(key), store=store) as f:
        restore(f, "back")
        assert f.generate("back") == nodes.answer


@pytest.fixture
def proxy(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What the nodes take for the bucket."""
    with FaultProxy(bucket.endpoint) as running:
        monkeypatch.setenv("S3_ENDPOINT", running.endpoint)
        yield running


@pytest.mark.parametrize("fault", ["errors", "cut", "slow"])
def test_a_store_that_stumbles_delays_a_restore_and_does_not_fail_it(
    nodes: StoreNodes, proxy: FaultProxy, b: Daemon, fault: str
) -> None:
    proxy.stumble(fault, connections=3)
    restore(b, "back", digest=nodes.digest)
    assert b.generate("back") == nodes.answer
    assert proxy.stumbled


def test_while_the_store_is_down_what_is_here_serves_and_the_rest_is_unavailable(
    nodes: StoreNodes, proxy: FaultProxy, b: Daemon, small_model: Path
) -> None:
    # given: one snapshot is here, one only there
    b.start_instance("source", small_model)
    capture(b, snapshot="here")
    proxy.down()

    # then
    assert refused(b, "there").reason == "STORE_UNAVAILABLE"
    assert list(listed(b)) == ["here"]
    restore(b, "here", "here")
    assert b.generate("here") == nodes.answer

    # and an upload that begins meanwhile ends when the store is back
    begun = b.snapshots.PublishSnapshot(snapshots_pb2.PublishSnapshotRequest(name="snapshots/here"))
    proxy.up()
    assert b.wait(begun, snapshots_pb2.Snapshot()).published
    restore(b, "there")
    delete(b, "here")


def test_a_full_disk_refuses_a_fetch_and_keeps_nothing_of_it(nodes: StoreNodes, tmp_path: Path) -> None:
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(tmp_path)), check=True)
    try:
        with nodes.node("full", "--cache-dir", str(tmp_path / "cache"), "--cache-bytes", "0") as full:
            assert refused(full, "victim").reason == "DISK_FULL"
            assert list((tmp_path / "cache").iterdir()) == []
            assert listed(full)["one"].published
    finally:
        subprocess.run(("umount", str(tmp_path)), check=True)


@pytest.mark.parametrize("threads", [1, 8])
def test_a_disk_that_fills_up_in_the_middle_refuses_a_fetch_and_the_node_serves_on(
    nodes: StoreNodes, proxy: FaultProxy, tmp_path: Path, threads: int
) -> None:
    # given: there was room, until the first chunk was asked for
    ballast = tmp_path / "ballast"

    def fill(data: bytes) -> None:
        if data.startswith(b"GET ") and b"/chunks/" in data and not ballast.exists():
            free = shutil.disk_usage(tmp_path).free
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - (30 << 20))

    proxy.asked = fill
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(tmp_path)), check=True)
    try:
        flags = ("--cache-dir", str(tmp_path / "cache"), "--cache-bytes", "0", "--threads", str(threads))
        with nodes.node(f"filled-{threads}", *flags) as filled:
            # then
            assert refused(filled, "victim").reason == "DISK_FULL"
            assert list((tmp_path / "cache").iterdir()) == []

            # and with room again it restores
            proxy.asked = lambda data: None
            ballast.unlink()
            restore(filled, "back", digest=nodes.digest)
            assert filled.generate("back") == nodes.answer
    finally:
        subprocess.run(("umount", str(tmp_path)), check=True)


def test_a_full_disk_refuses_a_capture_whose_source_serves_on(
    nodes: StoreNodes, small_model: Path, tmp_path: Path
) -> None:
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(tmp_path)), check=True)
    try:
        with nodes.node("brimful", "--cache-dir", str(tmp_path / "cache"), "--cache-bytes", "0") as brimful:
            brimful.start_instance("source", small_model)
            with pytest.raises(DumontError) as refused:
                capture(brimful)
            assert (refused.value.reason, refused.value.code) == ("DISK_FULL", "RESOURCE_EXHAUSTED")
            assert list((tmp_path / "cache").iterdir()) == []
            assert brimful.generate("source") == nodes.answer
    finally:
        subprocess.run(("umount", str(tmp_path)), check=True)


def test_wrong_credentials_are_told_to_the_operator_and_never_printed(
    nodes: StoreNodes, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_SECRET_KEY", "not-the-secret")
    with nodes.node("g") as g:
        assert refused(g, "victim").reason == "STORE_CREDENTIALS_REFUSED"
        log = g.log()
    assert "STORE_CREDENTIALS_REFUSED" in log
    assert "not-the-secret" not in log
    assert bucket.secret_key not in log


def test_a_snapshot_that_nobody_published_is_not_found(b: Daemon) -> None:
    asked: tuple[tuple[Any, Any], ...] = (
        (b.snapshots.GetSnapshot, snapshots_pb2.GetSnapshotRequest(name="snapshots/no")),
        (b.snapshots.DeleteSnapshot, snapshots_pb2.DeleteSnapshotRequest(name="snapshots/no")),
    )
    for call, request in asked:
        with pytest.raises(grpc.RpcError) as failure:
            call(request)
        assert from_rpc_error(failure.value).reason == "SNAPSHOT_NOT_FOUND"
    with pytest.raises(DumontError) as refusal:
        publish(b, "no")
    assert refusal.value.reason == "SNAPSHOT_NOT_FOUND"


def client(bucket: S3Server) -> Minio:
    return Minio(
        bucket.endpoint.removeprefix("http://"), bucket.access_key, bucket.secret_key, secure=False,
        region="us-east-1",
    )  # fmt: skip


def keys(bucket: S3Server, prefix: str) -> list[str]:
    found = client(bucket).list_objects(bucket.bucket, prefix, recursive=True)
    return [item.object_name for item in found if item.object_name]


def readable_keys(bucket: S3Server, prefix: str, marker: bytes) -> list[str]:
    return [key for key in keys(bucket, prefix) if reads(content(bucket, key), marker)]


def content(bucket: S3Server, key: str) -> bytes:
    response = client(bucket).get_object(bucket.bucket, key)
    try:
        return bytes(response.read())
    finally:
        response.close()
        response.release_conn()

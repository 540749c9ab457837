"""Whoever owns the bucket cannot make a node run anything: each is refused before CRIU, and remembered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from snapshotd.repository.codec import LENGTH, ZSTD
from snapshotd.repository.document import VERSION
from snapshotd.repository.object_keys import chunk_key
from snapshotd.repository.signing import Signer
from tests.helpers.tampering import flip_a_byte
from tests.node.daemon import Daemon
from tests.node.store_nodes import Snapshot, StoreNodes, capture, listed, publish, refused, restore

pytestmark = pytest.mark.node

GIB = 1 << 30
# What the node logs when CRIU has been called.
CRIU_STEP = '"step": "criu"'


class Bucket:
    """The objects as their owner sees them, with the right to change anything."""

    def __init__(self, root: Path, signer: Signer) -> None:
        self.root = root
        self.signer = signer

    def manifest(self, snapshot: str = "one") -> Path:
        return self.root / "snapshots" / snapshot / "manifest"

    def body(self, snapshot: str = "one") -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.manifest(snapshot).read_bytes().partition(b"\n")[2])
        return document

    def chunks(self, snapshot: str = "one") -> list[Path]:
        """Full ones, as the manifest names them."""
        document = self.body(snapshot)
        names = [
            document["chunks"][extent[0]][0]
            for file in document["files"]
            if file["name"].startswith("pages-")
            for extent in file["extents"]
            if isinstance(extent, list)
        ]
        return [self.root / chunk_key(name) for name in dict.fromkeys(names)]

    def sign(self, document: dict[str, Any], signer: Signer | None = None) -> None:
        """Publish it over the manifest, with a signature that is good if the signer is trusted."""
        signer = signer or self.signer
        body = json.dumps({**document, "signer": signer.key_id}, sort_keys=True).encode()
        head = f"dumont-snapshot {VERSION} {signer.key_id} {signer.sign(body).hex()}\n".encode()
        self.manifest().write_bytes(head + body)


def flip(bucket: Bucket) -> None:
    chunk = bucket.chunks()[0]
    chunk.write_bytes(flip_a_byte(chunk.read_bytes()))


def truncate(bucket: Bucket) -> None:
    data = bucket.chunks()[0].read_bytes()
    bucket.chunks()[0].write_bytes(data[: len(data) // 2])


def remove(bucket: Bucket) -> None:
    bucket.chunks()[0].unlink()


def swap(bucket: Bucket) -> None:
    one, other = bucket.chunks()[:2]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def take_from_another(bucket: Bucket) -> None:
    foreign = next(chunk for chunk in bucket.chunks("two") if chunk not in bucket.chunks("one"))
    bucket.chunks()[0].write_bytes(foreign.read_bytes())


def bomb(bucket: Bucket) -> None:
    packed = zstandard.compress(bytes(GIB))
    bucket.chunks()[0].write_bytes(bytes([ZSTD]) + len(packed).to_bytes(LENGTH, "little") + packed)


def edit(bucket: Bucket) -> None:
    data = bucket.manifest().read_bytes()
    bucket.manifest().write_bytes(data.replace(b'"deployment":"', b'"deployment":"x', 1))


def sign_with_another_key(bucket: Bucket) -> None:
    bucket.sign(bucket.body(), Signer(Ed25519PrivateKey.generate()))


def give_it_another_id(bucket: Bucket) -> None:
    shutil.copy2(bucket.manifest("two"), bucket.manifest("one"))


def name_a_file(name: str) -> Callable[[Bucket], None]:
    def tamper(bucket: Bucket) -> None:
        document = bucket.body()
        document["manifest"]["manifest"]["files"][0]["name"] = name
        document["files"][0]["name"] = name
        bucket.sign(document)

    return tamper


def size_a_file(size: int) -> Callable[[Bucket], None]:
    def tamper(bucket: Bucket) -> None:
        document = bucket.body()
        document["manifest"]["manifest"]["files"][0]["size"] = size
        document["files"][0]["size"] = size
        bucket.sign(document)

    return tamper


def list_too_many(bucket: Bucket) -> None:
    document = bucket.body()
    document["files"][0]["extents"] = [1] * 2_000_000
    bucket.sign(document)


def twins(bucket: Bucket) -> None:
    document = bucket.body()
    described, files = document["manifest"]["manifest"]["files"], document["files"]
    described.append({**described[0], "name": described[0]["name"].upper()})
    files.append({**files[0], "name": files[0]["name"].upper()})
    bucket.sign(document)


def make_it_huge(bucket: Bucket) -> None:
    with bucket.manifest().open("ab") as file:
        file.truncate(GIB)


TAMPERINGS: dict[str, tuple[Callable[[Bucket], None], str]] = {
    "a flipped byte": (flip, "CHUNK_DAMAGED"),
    "a truncated chunk": (truncate, "CHUNK_DAMAGED"),
    "a missing chunk": (remove, "CHUNK_MISSING"),
    "two chunks swapped": (swap, "CHUNK_DAMAGED"),
    "a chunk of another snapshot": (take_from_another, "CHUNK_DAMAGED"),
    "a decompression bomb": (bomb, "CHUNK_DAMAGED"),
    "an edited manifest": (edit, "SIGNATURE_WRONG"),
    "an unknown signer": (sign_with_another_key, "UNTRUSTED_SIGNER"),
    "another snapshot's manifest": (give_it_another_id, "MANIFEST_MISPLACED"),
    "../x": (name_a_file("../x"), "MANIFEST_DAMAGED"),
    "/etc/x": (name_a_file("/etc/x"), "MANIFEST_DAMAGED"),
    "a//b": (name_a_file("a//b"), "MANIFEST_DAMAGED"),
    "NUL": (name_a_file("a\0b"), "MANIFEST_DAMAGED"),
    "the manifest's own name": (name_a_file("manifest.json"), "MANIFEST_DAMAGED"),
    "case twins": (twins, "MANIFEST_DAMAGED"),
    "a negative size": (size_a_file(-1), "MANIFEST_DAMAGED"),
    "2^63 bytes": (size_a_file(1 << 63), "MANIFEST_DAMAGED"),
    "another size": (size_a_file(4096 << 20), "MANIFEST_DAMAGED"),
    "too many extents": (list_too_many, "MANIFEST_DAMAGED"),
    "a huge manifest": (make_it_huge, "MANIFEST_DAMAGED"),
}


@pytest.fixture(scope="module")
def nodes(
    criu: Path,
    small_model: Path,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> StoreNodes:
    """Two snapshots in a directory, published by node ``a``, which is gone."""
    root = tmp_path_factory.mktemp("tampered")
    made = StoreNodes(root, free_port, f"file://{root}/bucket")
    with made.node("a", store=f"file://{root}/pristine") as a:
        a.start_instance("source", small_model)
        made.digest = capture(a).manifest_digest
        capture(a, snapshot="two")
        publish(a)
        publish(a, "two")
        made.answer = a.generate("source")
        made.trust("a")
    return made


@pytest.fixture
def bucket(nodes: StoreNodes) -> Bucket:
    """As it was published."""
    root = nodes.root / "bucket"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(nodes.root / "pristine", root)
    return Bucket(root, Signer.open(nodes.root / "a" / "signing.key"))


@pytest.fixture(scope="module")
def victim(nodes: StoreNodes) -> Iterator[Daemon]:
    """A node that trusts ``a`` and holds nothing."""
    with nodes.node("victim") as daemon:
        yield daemon


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_it_is_refused_before_criu_and_quarantined_by_name(
    nodes: StoreNodes, bucket: Bucket, victim: Daemon, tampering: str
) -> None:
    tamper, reason = TAMPERINGS[tampering]
    tamper(bucket)
    before = victim.log().count(CRIU_STEP)

    error = refused(victim, "victim", digest=nodes.digest)

    assert error.reason == reason
    known = listed(victim)["one"]
    assert known.state == Snapshot.STATE_QUARANTINED
    assert known.quarantine_reason.startswith(reason)
    assert (known.local, known.published) == (False, True)
    assert victim.log().count(CRIU_STEP) == before
    snapshots, instances = nodes.root / "victim/snapshots", nodes.root / "victim/instances"
    assert [*snapshots.iterdir(), *instances.iterdir()] == []
    assert not (nodes.root / "x").exists()
    # It is known by what it was, so the next restore reads nothing of it.
    assert refused(victim, "again").reason in (reason, "SNAPSHOT_QUARANTINED")
    for record in (nodes.root / "victim/damaged").iterdir():
        record.unlink()


def test_an_older_manifest_in_its_place_is_refused_by_its_digest(
    nodes: StoreNodes, bucket: Bucket, victim: Daemon
) -> None:
    # given: an earlier snapshot of the same id, by the same trusted node
    document = bucket.body()
    document["manifest"]["manifest"]["create_time"] = "2020-01-01T00:00:00Z"
    bucket.sign(document)

    assert refused(victim, "victim", digest=nodes.digest).reason == "MANIFEST_REPLACED"

    assert list((nodes.root / "victim/snapshots").iterdir()) == []


def test_what_nobody_touched_still_serves(nodes: StoreNodes, bucket: Bucket, victim: Daemon) -> None:
    restore(victim, "back", digest=nodes.digest)
    assert victim.generate("back") == nodes.answer
    assert CRIU_STEP in victim.log()

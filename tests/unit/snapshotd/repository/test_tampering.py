"""Whatever the bucket's owner does to it, a snapshot is refused with a named reason or it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

from dumont.errors import DataLoss, DumontError, PermissionDenied
from snapshotd.adapters.object_store.key_file import KeyFile
from snapshotd.repository import document
from snapshotd.repository.codec import ZSTD
from snapshotd.repository.model import CHUNK, PublishedSnapshot
from snapshotd.repository.object_keys import chunk_key
from snapshotd.repository.repository import Repository
from snapshotd.repository.signing import Signer
from tests.unit.snapshotd.repository.world import (
    GRACE,
    MemoryObjects,
    a_key_file,
    a_node,
    a_signer,
    an_image,
    contents,
    noise,
)

MANIFEST = "snapshots/s1/manifest"
CONTENT = {"pages-1.img": noise(CHUNK, 1) + noise(CHUNK, 2), "pages-2.img": b"compressible " * 1000}


class World:
    """A snapshot published by one node, and another node that trusts it."""

    def __init__(self, folder: Path, encrypted: bool) -> None:
        self.folder = folder
        self.objects = MemoryObjects()
        self.signer = a_signer()
        wrapper = KeyFile(a_key_file(folder / "key")) if encrypted else None
        self.source = a_node(self.objects, self.signer, wrapper=wrapper)
        self.reader = a_node(self.objects, trusts=(self.signer,), wrapper=wrapper)

    async def publish(self, snapshot: str = "s1", content: dict[str, bytes] = CONTENT) -> PublishedSnapshot:
        images = self.folder / f"images-{snapshot}"
        return await self.source.publish(an_image(images, snapshot, content), images)


@pytest.fixture(params=["plain", "encrypted"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(tmp_path, request.param == "encrypted")


async def refusal(store: Repository, into: Path) -> DumontError:
    """The error that a restore of s1 meets, and nothing but right bytes was written until then."""
    into.mkdir()
    with pytest.raises(DumontError) as error:
        await store.fetch(await store.get("s1"), into)
    for name, data in contents(into).items():
        for start in range(0, len(data), CHUNK):
            written = data[start : start + CHUNK]
            assert written in (CONTENT[name][start : start + CHUNK], bytes(len(written)))
    return error.value


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: bytes([data[0] ^ 0x80]) + data[1:],
    ],
    ids=["flipped", "truncated", "longer", "empty", "unknown"],
)
async def test_a_damaged_chunk(world: World, damage: Callable[[bytes], bytes]) -> None:
    for number, chunk in enumerate(sorted((await world.publish()).chunks())):
        kept = world.objects.objects[chunk_key(chunk)]
        world.objects.change(chunk_key(chunk), damage)
        error = await refusal(world.reader, world.folder / f"into-{number}")
        assert (type(error), error.reason) == (DataLoss, "CHUNK_DAMAGED")
        assert error.metadata["snapshot"] == "s1"
        assert error.metadata["file"] in CONTENT
        world.objects.objects[chunk_key(chunk)] = kept


async def test_a_missing_chunk(world: World) -> None:
    snapshot = await world.publish()
    world.objects.objects.pop(chunk_key(min(snapshot.chunks())))
    error = await refusal(world.reader, world.folder / "into")
    assert (type(error), error.reason) == (DataLoss, "CHUNK_MISSING")


async def test_two_chunks_swapped(world: World) -> None:
    snapshot = await world.publish()
    one, other = (chunk_key(piece.chunk) for piece in snapshot.files[0].pieces())
    world.objects.objects[one], world.objects.objects[other] = (
        world.objects.objects[other],
        world.objects.objects[one],
    )
    assert (await refusal(world.reader, world.folder / "into")).reason == "CHUNK_DAMAGED"


async def test_a_chunk_from_another_snapshot(world: World) -> None:
    snapshot = await world.publish()
    other = await world.publish("s2", {"pages-1.img": noise(CHUNK, 9)})
    key = chunk_key(next(snapshot.pieces()).chunk)
    world.objects.objects[key] = world.objects.objects[chunk_key(next(other.pieces()).chunk)]
    assert (await refusal(world.reader, world.folder / "into")).reason == "CHUNK_DAMAGED"


async def test_verify_reads_everything_and_names_every_hurt_file(world: World) -> None:
    snapshot = await world.publish()
    await world.reader.verify(snapshot)
    for file in snapshot.files:
        world.objects.change(chunk_key(next(file.pieces()).chunk), flip)
    with pytest.raises(DataLoss) as error:
        await world.reader.verify(snapshot)
    assert error.value.reason == "CHUNK_DAMAGED"
    assert error.value.metadata["files"] == "pages-1.img,pages-2.img"


async def test_a_damaged_chunk_is_healed_by_the_next_snapshot_that_has_it(tmp_path: Path) -> None:
    world = World(tmp_path, encrypted=False)
    first = await world.publish("s1")
    chunk = next(first.pieces()).chunk
    world.objects.change(chunk_key(chunk), flip)
    with pytest.raises(DataLoss):
        await world.reader.verify(first)

    second = await world.publish("s2")

    await world.reader.verify(second)
    await world.reader.verify(first)
    assert world.objects.sent().count(chunk_key(chunk)) == 2
    assert world.objects.keys("damaged/") == set()


async def test_what_is_said_of_a_damaged_chunk_goes_with_it(tmp_path: Path) -> None:
    world = World(tmp_path, encrypted=False)
    snapshot = await world.publish("s1")
    world.objects.change(chunk_key(next(snapshot.pieces()).chunk), flip)
    with pytest.raises(DataLoss):
        await world.reader.verify(snapshot)
    world.objects.clock.advance(2 * GRACE)
    await world.source.prune(await world.source.plan_prune())
    assert len(world.objects.keys("damaged/")) == 1

    await world.source.delete("s1")
    world.objects.clock.advance(2 * GRACE)
    await world.source.prune(await world.source.plan_prune())
    assert world.objects.objects == {}


def _instead(edited: bytes, _: bytes) -> bytes:
    return edited


async def test_a_manifest_edited_anywhere(world: World) -> None:
    await world.publish()
    whole, _ = world.objects.objects[MANIFEST]
    for position in range(0, len(whole), 7):
        edited = whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        world.objects.change(MANIFEST, partial(_instead, edited))
        with pytest.raises((DataLoss, PermissionDenied)) as error:
            await world.reader.get("s1")
        assert error.value.reason in {"SIGNATURE_WRONG", "MANIFEST_DAMAGED", "UNTRUSTED_SIGNER"}
    assert await world.reader.list() == []


async def test_a_truncated_manifest(world: World) -> None:
    await world.publish()
    for change in (lambda data: data[:-1], lambda data: data[:50], lambda data: b""):
        world.objects.change(MANIFEST, change)
        with pytest.raises(DataLoss):
            await world.reader.get("s1")


async def test_a_manifest_signed_by_a_stranger(world: World) -> None:
    snapshot = await world.publish()
    data, _ = document.encode(snapshot.manifest, snapshot.files, snapshot.key, a_signer())
    world.objects.change(MANIFEST, lambda _: data)
    error = await refusal(world.reader, world.folder / "into")
    assert (type(error), error.reason) == (PermissionDenied, "UNTRUSTED_SIGNER")
    assert await world.reader.list() == []


async def test_a_stranger_who_claims_a_trusted_name(world: World) -> None:
    snapshot = await world.publish()
    stranger = a_signer()
    stranger.key_id = world.signer.key_id
    data, _ = document.encode(snapshot.manifest, snapshot.files, snapshot.key, stranger)
    world.objects.change(MANIFEST, lambda _: data)
    assert (await refusal(world.reader, world.folder / "into")).reason == "SIGNATURE_WRONG"


async def test_an_older_manifest_under_a_newer_id(world: World) -> None:
    await world.publish("s0", {"pages-1.img": b"older"})
    await world.publish("s1")
    older, _ = world.objects.objects["snapshots/s0/manifest"]
    world.objects.change(MANIFEST, lambda _: older)
    assert (await refusal(world.reader, world.folder / "into")).reason == "MANIFEST_MISPLACED"


async def test_an_older_manifest_of_the_same_id_has_another_digest(world: World) -> None:
    first = await world.publish("s1")
    older, _ = world.objects.objects[MANIFEST]
    await world.source.delete("s1")
    images = world.folder / "again"
    second = await world.source.publish(an_image(images, "s1", {"pages-1.img": b"newer"}), images)
    world.objects.change(MANIFEST, lambda _: older)
    replayed = await world.reader.get("s1")
    # What the controller remembers is the second's.
    assert replayed.digest == first.digest != second.digest


def signed(signer: Signer, snapshot: PublishedSnapshot, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A document that says something impossible, signed by a key that is trusted."""
    data, _ = document.encode(snapshot.manifest, snapshot.files, snapshot.key, signer)
    stated = json.loads(data.partition(b"\n")[2])
    change(stated)
    body = json.dumps(stated, sort_keys=True).encode()
    return f"dumont-snapshot {document.VERSION} {signer.key_id} {signer.sign(body).hex()}\n".encode() + body


def rename(name: str) -> Callable[[dict[str, Any]], None]:
    def change(stated: dict[str, Any]) -> None:
        stated["files"][0]["name"] = stated["manifest"]["manifest"]["files"][0]["name"] = name

    return change


def resize(size: object, extents: object = None) -> Callable[[dict[str, Any]], None]:
    def change(stated: dict[str, Any]) -> None:
        stated["files"][0]["size"] = stated["manifest"]["manifest"]["files"][0]["size"] = size
        if extents is not None:
            stated["files"][0]["extents"] = extents

    return change


def put(path: str, value: object, *more: str) -> Callable[[dict[str, Any]], None]:
    """Say ``value`` at ``path``, which may be the next of a list, and at ``more`` paths."""

    def change(stated: dict[str, Any]) -> None:
        for where in (path, *more):
            *parents, last = where.split(".")
            inner: Any = stated
            for parent in parents:
                inner = inner[int(parent) if parent.isdigit() else parent]
            if isinstance(inner, list):
                inner[int(last) : int(last) + 1] = [value]
            else:
                inner[last] = value

    return change


NAMES = ["../x", "/etc/x", "a//b", "a/b", "a\0b", "", ".", "..", "x" * 300, "PAGES-2.img", "manifest.json"]
LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"name-{number}": rename(name) for number, name in enumerate(NAMES)},
    "case twins": rename("pages-2.IMG"),
    "negative size": resize(-1),
    "huge size": resize(1 << 63),
    "size of text": resize("8"),
    "size that is no number": resize(float("nan")),
    "too large for its chunks": resize(1 << 40),
    "absurd hole": resize(8 << 20, [1 << 60]),
    "negative hole": resize(8 << 20, [16 << 20, -(8 << 20)]),
    "true as a hole": resize(1, [True]),
    "nested extents": resize(CHUNK, [[[["x"]]]]),
    "an extent of nothing": resize(CHUNK, [[0, 0, 0], CHUNK]),
    "an extent of half a byte": resize(CHUNK, [[0, 0, 0.5], CHUNK]),
    "an extent beyond its chunk": resize(CHUNK, [[0, 1, CHUNK]]),
    "an extent before its chunk": resize(CHUNK, [[0, -1, CHUNK]]),
    "an extent of no chunk": resize(CHUNK, [[3, 0, CHUNK]]),
    "an extent of a chunk before the first": resize(CHUNK, [[-1, 0, CHUNK]]),
    "too many extents": resize(1 << 44, [1] * (document.MOST_EXTENTS + 1)),
    "too many chunks": put("chunks", [["ab" * 32, 1]] * (document.MOST_CHUNKS + 1)),
    "a chunk twice": put("chunks.1", ["ab" * 32, CHUNK], "chunks.0"),
    "a chunk that nothing needs": put("chunks.3", ["ab" * 32, CHUNK]),
    "a chunk's name is a path": put("chunks.0", ["../" * 21 + "a", CHUNK]),
    "a chunk's name is a number": put("chunks.0", [7, CHUNK]),
    "a huge chunk": put("chunks.0.1", CHUNK + 1),
    "a chunk of nothing": put("chunks.0.1", 0),
    "no chunks": put("chunks", None),
    "other files": put("files", []),
    "files of text": put("files", "x" * 100),
    "no encryption said": put("encryption", 7),
    "a key of another form": put("encryption", {"key_id": 5, "wrapped": "AAAA"}),
    "another version": put("version", 1),
    "another signer": put("signer", "0" * 32),
    "an id that is a path": put("manifest.manifest.id", "../s1"),
    "no manifest": put("manifest", None),
}


@pytest.mark.parametrize("lie", sorted(LIES))
async def test_a_signed_manifest_that_cannot_be_true(tmp_path: Path, lie: str) -> None:
    world = World(tmp_path, encrypted=False)
    data = signed(world.signer, await world.publish(), LIES[lie])
    world.objects.change(MANIFEST, lambda _: data)
    error = await refusal(world.reader, tmp_path / "into")
    assert (type(error), error.reason) == (DataLoss, "MANIFEST_DAMAGED")
    assert contents(tmp_path / "into") == {}


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"version": 2, "signer": ' + b'{"a":' * 50_000, b"null", b"\xff"],
    ids=["lists", "objects", "null", "bytes"],
)
async def test_a_signed_manifest_that_is_none(tmp_path: Path, data: bytes) -> None:
    world = World(tmp_path, encrypted=False)
    await world.publish()
    head = (
        f"dumont-snapshot {document.VERSION} {world.signer.key_id} {world.signer.sign(data).hex()}\n".encode()
    )
    world.objects.change(MANIFEST, lambda _: head + data)
    assert (await refusal(world.reader, tmp_path / "into")).reason == "MANIFEST_DAMAGED"


async def test_a_manifest_of_another_version_is_refused_as_such(world: World, tmp_path: Path) -> None:
    await world.publish()
    world.objects.change(
        MANIFEST, lambda data: b"dumont-snapshot 1 " + data.removeprefix(b"dumont-snapshot 2 ")
    )
    error = await refusal(world.reader, tmp_path / "into")
    assert (type(error), error.reason) == (DataLoss, "MANIFEST_VERSION")
    assert "version 1" in error.message
    assert await world.reader.list() == []


async def test_a_manifest_of_a_hundred_megabytes_is_not_read(tmp_path: Path) -> None:
    world = World(tmp_path, encrypted=False)
    await world.publish()
    world.objects.change(MANIFEST, lambda data: data + bytes(100 << 20))
    assert (await refusal(world.reader, tmp_path / "into")).reason == "MANIFEST_DAMAGED"


async def test_a_decompression_bomb(tmp_path: Path) -> None:
    world = World(tmp_path, encrypted=False)
    snapshot = await world.publish()
    packed = zstandard.compress(bytes(1 << 30))
    bomb = bytes([ZSTD]) + len(packed).to_bytes(4, "little") + packed
    assert len(bomb) < CHUNK
    world.objects.change(chunk_key(next(snapshot.pieces()).chunk), lambda _: bomb)
    error = await refusal(world.reader, tmp_path / "into")
    assert error.reason == "CHUNK_DAMAGED"
    assert "unpacks to more" in error.message


async def test_a_frame_that_asks_for_a_huge_window(tmp_path: Path) -> None:
    world = World(tmp_path, encrypted=False)
    snapshot = await world.publish()
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(noise(1000)) + compressor.flush()
    greedy = bytes([ZSTD]) + len(packed).to_bytes(4, "little") + packed
    world.objects.change(chunk_key(next(snapshot.pieces()).chunk), lambda _: greedy)
    assert (await refusal(world.reader, tmp_path / "into")).reason == "CHUNK_DAMAGED"

"""The parts of chunks come into their places, by either way, and a place that cannot be had is told."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dumont.errors import DataLoss
from snapshotd.repository import chunk_writer
from snapshotd.repository.chunk_writer import MANY, ChunkWriter, Unpack
from snapshotd.repository.codec import Codec, damaged
from snapshotd.repository.model import Piece
from tests.unit.snapshotd.repository.world import MemoryObjects, a_node, an_image, noise

SIZE = 1 << 20
NAME = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is all holes."""
    path = tmp_path / "a.img"
    path.touch()
    os.truncate(path, SIZE)
    return path


@pytest.fixture(params=["written", "mapped"])
def mapped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """How chunks are to come into their places."""
    monkeypatch.setattr(chunk_writer, "_in_memory", lambda device: True)
    monkeypatch.setattr(chunk_writer, "HUGE_PAGE", 1 << 40)
    return bool(request.param == "mapped")


def fill(path: Path, mapped: bool, pieces: Sequence[Piece], unpack: Unpack) -> None:
    ChunkWriter(path.parent, MANY if mapped else MANY - 1).fill(pieces, unpack)


def holding(plain: bytes, given: list[bool] | None = None) -> Unpack:
    """Unpacks a chunk of these bytes; what it was given memory for is told in ``given``."""

    def unpack(into: memoryview | None) -> memoryview:
        if given is not None:
            given.append(into is not None)
        if into is None:
            return memoryview(plain)
        into[:] = plain
        return into

    return unpack


def a_whole_chunk(offset: int, size: int) -> Piece:
    return Piece("a.img", offset, size, NAME, 0, size)


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 300_000])
@pytest.mark.parametrize("size", [1, 4096, 70_001])
def test_a_chunk_is_at_its_offset_and_nothing_else(path: Path, mapped: bool, offset: int, size: int) -> None:
    plain = noise(size)
    fill(path, mapped, [a_whole_chunk(offset, size)], holding(plain))
    assert path.read_bytes() == bytes(offset) + plain + bytes(SIZE - offset - size)


def test_a_chunk_that_belongs_in_one_place_is_unpacked_there_by_many(path: Path, mapped: bool) -> None:
    given: list[bool] = []
    fill(path, mapped, [a_whole_chunk(8192, 5000)], holding(noise(5000), given))
    assert given == [mapped]


def test_few_do_so_where_pages_are_huge(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_writer, "_in_memory", lambda device: True)
    monkeypatch.setattr(chunk_writer, "HUGE_PAGE", 0)
    given: list[bool] = []
    fill(path, False, [a_whole_chunk(8192, 5000)], holding(noise(5000), given))
    assert given == [True]


def test_nobody_does_so_on_a_disk(path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_writer, "_in_memory", lambda device: False)
    given: list[bool] = []
    fill(path, mapped, [a_whole_chunk(8192, 5000)], holding(noise(5000), given))
    assert given == [False]


def test_a_chunk_comes_into_all_of_its_places(path: Path, mapped: bool) -> None:
    (path.parent / "b.img").write_bytes(bytes(10))
    plain = noise(5000)
    pieces = [
        Piece("a.img", 0, 3000, NAME, 0, 5000),
        Piece("a.img", 9000, 3000, NAME, 0, 5000),
        Piece("b.img", 2, 8, NAME, 4000, 5000),
    ]
    fill(path, mapped, pieces, holding(plain))
    assert path.read_bytes()[:12_000] == plain[:3000] + bytes(6000) + plain[:3000]
    assert (path.parent / "b.img").read_bytes() == bytes(2) + plain[4000:4008]


def no_room(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_want_of_room_is_an_error_before_anything_is_touched(
    path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate" if mapped else "pwrite", no_room)
    given: list[bool] = []
    with pytest.raises(OSError, match="No space left"):
        fill(path, mapped, [a_whole_chunk(0, SIZE)], holding(noise(SIZE), given))
    assert given == ([] if mapped else [False])


def test_what_cannot_be_mapped_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_mapping(*arguments: object, **others: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(chunk_writer, "_in_memory", lambda device: True)
    monkeypatch.setattr("mmap.mmap", no_mapping)
    plain = noise(SIZE)
    fill(path, True, [a_whole_chunk(0, SIZE)], holding(plain))
    assert path.read_bytes() == plain


def test_what_is_in_memory_is_known() -> None:
    assert chunk_writer._in_memory(Path("/dev/shm").stat().st_dev)
    assert not chunk_writer._in_memory(Path("/proc").stat().st_dev)


def test_a_chunk_that_is_refused_leaves_nothing_open(path: Path, mapped: bool) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())

    def refuse(into: memoryview | None) -> memoryview:
        raise damaged(NAME, "it is a test's")

    with pytest.raises(DataLoss):
        fill(path, mapped, [a_whole_chunk(0, SIZE)], refuse)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert str(path) not in Path("/proc/self/maps").read_text()


async def test_a_fetch_that_fails_keeps_nothing_of_its_files(
    tmp_path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a chunk that is damaged, and nobody who collects what refers to itself
    monkeypatch.setattr(chunk_writer, "MANY", 1 if mapped else 99)
    objects = MemoryObjects()
    store = a_node(objects)
    manifest = an_image(tmp_path / "images", content={"pages-1.img": b"x" * 100_000 + noise(100_000)})
    snapshot = await store.publish(manifest, tmp_path / "images")
    (key,) = objects.keys("chunks/")
    objects.change(key, lambda stored: stored[:-1] + bytes([stored[-1] ^ 1]))
    folder = tmp_path / "into"
    folder.mkdir()
    gc.disable()
    try:
        # when
        with pytest.raises(DataLoss):
            await store.fetch(snapshot, folder)
        # then
        assert str(folder) not in Path("/proc/self/maps").read_text()
        assert not [entry for entry in Path("/proc/self/fd").iterdir() if folder in entry.resolve().parents]
    finally:
        gc.enable()


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("make", [noise, bytes], ids=["stored as it is", "compressed"])
def test_what_a_store_packed_is_unpacked_in_place(
    path: Path, mapped: bool, encrypted: bool, make: Callable[[int], bytes]
) -> None:
    codec, plain = Codec("s1", bytes(32) if encrypted else None), make(SIZE)
    name = codec.name(plain)
    stored = codec.pack(name, plain)
    fill(path, mapped, [a_whole_chunk(0, SIZE)], lambda into: codec.open(name, stored, SIZE, into))
    assert path.read_bytes() == plain


@pytest.mark.parametrize("size", [SIZE - 4096, SIZE + 4096, 9 * SIZE])
def test_what_has_another_size_is_refused_and_writes_nothing_beyond_its_place(
    path: Path, mapped: bool, size: int
) -> None:
    # given: it compresses well, so that a small object unpacks to as much as it likes
    codec, plain = Codec("s1", None), b"x" * size
    name = codec.name(plain)
    stored = codec.pack(name, plain)
    half = SIZE // 2
    with pytest.raises(DataLoss):
        fill(path, mapped, [a_whole_chunk(0, half)], lambda into: codec.open(name, stored, half, into))
    assert path.read_bytes()[half:] == bytes(SIZE - half)

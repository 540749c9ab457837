"""The parts of chunks come into their places, by whichever way, and a place that cannot be had is told."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from snapshotd.store import placing
from snapshotd.store.model import Piece
from snapshotd.store.placing import STEP, Places, copy
from tests.unit.snapshotd.store.world import noise

SIZE = 4 * STEP


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is all holes."""
    path = tmp_path / "a.img"
    path.touch()
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def descriptor(path: Path) -> Iterator[int]:
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


def a_piece(offset: int, size: int, start: int = 0) -> Piece:
    return Piece("a.img", offset, size, "ab" * 32, start, start + size)


def no_page(descriptor: int, into: list[memoryview], offset: int) -> int:
    """What reading into a mapping says where no page can be had for it."""
    raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, STEP + 7])
@pytest.mark.parametrize("size", [1, 4096, STEP, 2 * STEP + 9])
def test_what_is_copied_is_at_its_offset_and_nothing_else(
    path: Path, descriptor: int, offset: int, size: int
) -> None:
    plain = noise(size)
    assert copy(descriptor, memoryview(plain), offset) == size
    assert path.read_bytes() == bytes(offset) + plain + bytes(SIZE - offset - size)


def test_a_page_that_cannot_be_had_ends_a_copy_and_not_the_process(
    path: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: pages vanish while they are mapped; whoever touches one of them gets a SIGBUS
    read, plain, reads = os.preadv, noise(SIZE), iter(range(9))

    def after_a_cut(source: int, into: list[memoryview], offset: int) -> int:
        if next(reads) == 1:
            os.truncate(descriptor, STEP + 4096)
        return read(source, into, offset)

    monkeypatch.setattr(os, "preadv", after_a_cut)
    # then
    assert copy(descriptor, memoryview(plain), 0) == STEP + 4096
    assert path.read_bytes() == plain[: STEP + 4096]


def test_who_finds_others_in_the_queue_does_not_wait_for_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: one is in the middle of writing
    write, writing, go_on = placing.write, threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        writing.set()
        assert go_on.wait(10)
        write(*args)

    monkeypatch.setattr(placing, "QUEUE", 1)
    monkeypatch.setattr(placing, "write", slow)
    places, plain = Places(path.parent), noise(2 * STEP)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(places.fill, [a_piece(0, STEP)], memoryview(plain))
        assert writing.wait(10)
        # when
        places.fill([a_piece(2 * STEP, STEP, start=STEP)], memoryview(plain))
        # then
        assert path.read_bytes() == bytes(2 * STEP) + plain[STEP:] + bytes(STEP)
        go_on.set()
        first.result()
    assert path.read_bytes() == plain[:STEP] + bytes(STEP) + plain[STEP:] + bytes(STEP)


@pytest.mark.parametrize("queue", [0, 2])
def test_a_chunk_comes_into_all_of_its_places(
    path: Path, monkeypatch: pytest.MonkeyPatch, queue: int
) -> None:
    monkeypatch.setattr(placing, "QUEUE", queue)
    (path.parent / "b.img").write_bytes(bytes(10))
    plain = noise(5000)
    pieces = [a_piece(0, 3000), a_piece(9000, 3000), Piece("b.img", 2, 8, "ab" * 32, 4000, 5000)]
    Places(path.parent).fill(pieces, memoryview(plain))
    assert path.read_bytes()[:12_000] == plain[:3000] + bytes(6000) + plain[:3000]
    assert (path.parent / "b.img").read_bytes() == bytes(2) + plain[4000:4008]


def test_what_cannot_be_copied_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "QUEUE", 0)
    monkeypatch.setattr(os, "preadv", no_page)
    plain = noise(SIZE)
    Places(path.parent).fill([a_piece(0, SIZE)], memoryview(plain))
    assert path.read_bytes() == plain


@pytest.mark.parametrize("queue", [0, 1])
def test_who_cannot_write_says_why_and_gives_up_its_turn(
    path: Path, monkeypatch: pytest.MonkeyPatch, queue: int
) -> None:
    def full(descriptor: int, plain: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(placing, "QUEUE", queue)
    places, plain = Places(path.parent), noise(SIZE)
    with monkeypatch.context() as while_full:
        while_full.setattr(os, "preadv", no_page)
        while_full.setattr(placing, "write", full)
        with pytest.raises(OSError, match="No space left"):
            places.fill([a_piece(0, SIZE)], memoryview(plain))
    places.fill([a_piece(0, SIZE)], memoryview(plain))
    assert path.read_bytes() == plain

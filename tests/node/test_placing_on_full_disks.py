"""A chunk is placed on the file systems that images lie on, and a full one is an error, not a signal."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd.repository.chunk_writer import HUGE_PAGE, MANY, ChunkWriter
from snapshotd.repository.model import Piece

pytestmark = pytest.mark.node

DISK = 32 << 20
PLAIN = os.urandom(DISK)


@pytest.fixture(params=["tmpfs", "tmpfs with huge pages", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(root: None, kind: str, tmp_path: Path) -> Iterator[Path]:
    """A file, all holes, for all of which its file system has too little room."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    if kind == "ext4":
        disk = tmp_path / "disk"
        disk.touch()
        os.truncate(disk, DISK)
        run("mkfs.ext4", "-q", disk)
        run("mount", "-o", "loop", disk, mounted)
    else:
        huge = ",huge=within_size" if "huge" in kind else ""
        run("mount", "-t", "tmpfs", "-o", f"size={DISK // 2}{huge}", "tmpfs", mounted)
    try:
        path = mounted / "a.img"
        path.touch()
        os.truncate(path, DISK)
        assert (path.stat().st_blksize >= HUGE_PAGE) == ("huge" in kind)
        yield path
    finally:
        run("umount", mounted)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def put(path: Path, threads: int, offset: int, size: int) -> bool:
    """Put a chunk there; whether it was unpacked in its place."""
    given: list[bool] = []

    def unpack(into: memoryview | None) -> memoryview:
        given.append(into is not None)
        if into is None:
            return memoryview(PLAIN)[:size]
        into[:] = PLAIN[:size]
        return into

    ChunkWriter(path.parent, threads).fill([Piece(path.name, offset, size, "ab" * 32, 0, size)], unpack)
    return given == [True]


@pytest.mark.parametrize("threads", [1, MANY])
def test_a_chunk_that_has_room_is_there(path: Path, kind: str, threads: int) -> None:
    in_place = put(path, threads, 8 << 20, 5 << 20)
    assert in_place == ("huge" in kind or (kind == "tmpfs" and threads == MANY))
    assert path.read_bytes() == bytes(8 << 20) + PLAIN[: 5 << 20] + bytes(DISK - (13 << 20))


@pytest.mark.parametrize("threads", [1, MANY])
def test_what_has_no_place_is_refused_for_want_of_room(path: Path, threads: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        put(path, threads, 0, DISK)

"""A copy through a mapping tells of a full disk as an error, on the file systems that images lie on."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd.store import placing
from snapshotd.store.model import Piece
from snapshotd.store.placing import Places, copy

pytestmark = pytest.mark.node

DISK = 32 << 20
PLAIN = os.urandom(DISK)


@pytest.fixture(params=["tmpfs", "ext4"])
def path(root: None, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file, all holes, for which its file system has too little room."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    if request.param == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={DISK // 2}", "tmpfs", mounted)
    else:
        disk = tmp_path / "disk"
        disk.touch()
        os.truncate(disk, DISK)
        run("mkfs.ext4", "-q", disk)
        run("mount", "-o", "loop", disk, mounted)
    try:
        path = mounted / "a.img"
        path.touch()
        os.truncate(path, DISK)
        yield path
    finally:
        run("umount", mounted)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def test_a_copy_says_how_far_it_came(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        copied = copy(descriptor, memoryview(PLAIN), 0)
    finally:
        os.close(descriptor)
    assert 0 < copied < DISK
    assert path.read_bytes()[:copied] == PLAIN[:copied]


@pytest.mark.parametrize("queue", [0, 2])
def test_what_has_no_place_is_refused_for_want_of_room(
    path: Path, monkeypatch: pytest.MonkeyPatch, queue: int
) -> None:
    monkeypatch.setattr(placing, "QUEUE", queue)
    whole = Piece(path.name, 0, DISK, "ab" * 32, 0, DISK)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        Places(path.parent).fill([whole], memoryview(PLAIN))

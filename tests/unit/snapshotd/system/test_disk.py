"""Room on a disk is promised before it is written to, and some of it to nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from dumont.errors import ResourceExhausted
from snapshotd.system.disk import LARGEST_RESERVE, DiskReservations, FileSystem


def disk(total: int, free: int, kept: int | None = 0) -> DiskReservations:
    return DiskReservations(kept, lambda directory: FileSystem(1, total, free))


def test_what_fits_is_promised_and_the_rest_refused(tmp_path: Path) -> None:
    room = disk(1000, free=500)

    room.reserve("one", tmp_path, 300)
    with pytest.raises(ResourceExhausted) as refused:
        room.reserve("other", tmp_path, 201)

    assert refused.value.reason == "DISK_FULL"
    assert refused.value.metadata["needed"] == "201"


def test_what_was_promised_is_free_again_once_it_is_released(tmp_path: Path) -> None:
    room = disk(1000, free=500)
    room.reserve("one", tmp_path, 500)

    room.release("one")
    room.release("nobody")

    room.reserve("other", tmp_path, 500)
    with pytest.raises(ResourceExhausted):
        room.reserve("third", tmp_path, 1)


def test_what_others_take_of_a_promise_is_noticed_and_what_its_owner_writes_is_not(tmp_path: Path) -> None:
    free = {"bytes": 1 << 20}
    room = DiskReservations(0, lambda directory: FileSystem(1, 1 << 20, free["bytes"]))
    room.reserve("one", tmp_path, 1 << 20)

    (tmp_path / "file").write_bytes(bytes(64 << 10))
    free["bytes"] -= (tmp_path / "file").stat().st_blocks * 512
    assert not room.is_short("one", tmp_path)
    assert not room.is_short("nobody", tmp_path)

    free["bytes"] -= 1
    assert room.is_short("one", tmp_path)


def test_asking_again_replaces_what_one_was_promised(tmp_path: Path) -> None:
    room = disk(1000, free=500)
    room.reserve("one", tmp_path, 400)
    room.reserve("one", tmp_path, 500)

    with pytest.raises(ResourceExhausted):
        room.reserve("other", tmp_path, 1)


@pytest.mark.parametrize(("total", "kept"), [(1000, 20), (1 << 50, LARGEST_RESERVE)])
def test_some_of_a_disk_is_promised_to_nobody(tmp_path: Path, total: int, kept: int) -> None:
    room = disk(total, free=total, kept=None)

    with pytest.raises(ResourceExhausted):
        room.reserve("one", tmp_path, total - kept + 1)
    room.reserve("one", tmp_path, total - kept)

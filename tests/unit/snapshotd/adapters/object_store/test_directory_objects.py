"""Objects in a directory: what a cancelled writer leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dumont.errors import AlreadyExists
from snapshotd.adapters.object_store.directory import DirectoryObjects


@pytest.mark.parametrize("write", ["put", "create"])
async def test_a_cancelled_writer_leaves_no_file_in_a_directory_removed_after_it(
    write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a writer whose thread has begun
    objects = DirectoryObjects(tmp_path / "objects")
    begun, go_on = threading.Event(), threading.Event()
    work = getattr(objects, f"_{write}")

    def slow(key: str, data: bytes) -> None:
        begun.set()
        go_on.wait()
        work(key, data)

    monkeypatch.setattr(objects, f"_{write}", slow)
    writing = asyncio.create_task(getattr(objects, write)("chunks/one", b"one"))
    await asyncio.to_thread(begun.wait)

    # when: it is cancelled, and its directory removed once it has ended
    writing.cancel()
    asyncio.get_running_loop().call_soon(go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await writing
    shutil.rmtree(tmp_path / "objects", ignore_errors=True)

    # then: nothing comes after it
    await asyncio.get_running_loop().shutdown_default_executor()
    assert not (tmp_path / "objects").exists()


async def test_a_deleted_object_leaves_no_directory_of_its_own(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path / "objects")
    await objects.create("snapshots/one/manifest", b"1")
    await objects.create("snapshots/two/manifest", b"2")
    await objects.put("chunks/ab/abc", b"3")

    await objects.delete("snapshots/one/manifest")
    await objects.delete("chunks/ab/abc")
    await objects.delete("chunks/ab/abc")

    left = {path.relative_to(objects.root).as_posix() for path in objects.root.rglob("*") if path.is_dir()}
    assert left == {"snapshots", "snapshots/two", "chunks", "tmp"}


def test_a_directory_that_another_node_removes_is_made_again(tmp_path: Path) -> None:
    """One creates and another deletes the same name, again and again, as two nodes may."""
    objects = DirectoryObjects(tmp_path / "objects")

    def create() -> None:
        with contextlib.suppress(AlreadyExists):
            objects._create("snapshots/one/manifest", b"1")

    def delete() -> None:
        objects._delete("snapshots/one/manifest")

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(100) for work in (create, delete)]:
            done.result()
    create()
    assert (objects.root / "snapshots/one/manifest").read_bytes() == b"1"

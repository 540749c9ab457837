"""Objects in a directory: what a cancelled writer leaves behind."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

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

"""A fetch that is cancelled waits for no store, and for everybody who still writes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import pytest

from snapshotd.repository.chunk_writer import ChunkWriter, Unpack
from snapshotd.repository.model import Piece
from snapshotd.repository.ports import BytesLike, Run
from snapshotd.repository.workers import Turnstile
from tests.unit.snapshotd.repository.world import MemoryObjects, a_node, an_image, contents, noise

T = TypeVar("T")
CONTENT = {"pages-1.img": noise(5000)}
SECONDS = 10
# Long enough for what must not happen.
LITTLE = 0.2


class HangingObjects(MemoryObjects):
    """Its bytes come when ``coming`` is set; ``used`` counts who has used them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.coming, self.done = threading.Event(), threading.Event(), threading.Event()

    async def read(self, key: str, limit: int, use: Callable[[BytesLike], T], run: Run) -> T:
        stored = self.objects[key][0]

        def work() -> T:
            self.asked.set()
            assert self.coming.wait(SECONDS)
            try:
                return use(stored)
            finally:
                self.done.set()

        return await run(work)


async def begin(objects: MemoryObjects, folder: Path) -> asyncio.Task[None]:
    """A fetch into ``folder / "into"``."""
    store = a_node(objects)
    snapshot = await store.publish(an_image(folder / "images", content=CONTENT), folder / "images")
    (folder / "into").mkdir()
    return asyncio.create_task(store.fetch(snapshot, folder / "into"))


async def test_who_still_waits_for_the_store_is_left_and_writes_nothing(tmp_path: Path) -> None:
    # given
    objects = HangingObjects()
    fetching = await begin(objects, tmp_path)
    assert await asyncio.to_thread(objects.asked.wait, SECONDS)
    # when
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(fetching, SECONDS)
    # then
    assert not objects.done.is_set()
    objects.coming.set()
    assert await asyncio.to_thread(objects.done.wait, SECONDS)
    assert contents(tmp_path / "into") == {"pages-1.img": bytes(5000)}


async def test_who_writes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given
    writing, go_on, written = threading.Event(), threading.Event(), threading.Event()

    fill = ChunkWriter.fill

    def slow(places: ChunkWriter, pieces: list[Piece], unpack: Unpack) -> None:
        writing.set()
        assert go_on.wait(SECONDS)
        fill(places, pieces, unpack)
        written.set()

    monkeypatch.setattr(ChunkWriter, "fill", slow)
    fetching = await begin(MemoryObjects(), tmp_path)
    assert await asyncio.to_thread(writing.wait, SECONDS)
    # when
    fetching.cancel()
    await asyncio.wait([fetching], timeout=LITTLE)
    # then
    assert not fetching.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(fetching, SECONDS)
    assert written.is_set()
    assert contents(tmp_path / "into") == CONTENT


def test_it_is_not_shut_while_somebody_is_inside() -> None:
    turnstile = Turnstile()
    inside, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with turnstile.passed():
            inside.set()
            assert may_leave.wait(SECONDS)

    with ThreadPoolExecutor(2) as threads:
        staying = threads.submit(stay)
        assert inside.wait(SECONDS)
        shutting = threads.submit(turnstile.shut)
        assert wait([shutting], timeout=LITTLE).not_done
        may_leave.set()
        shutting.result(SECONDS)
        staying.result(SECONDS)


def test_nobody_comes_in_once_it_is_shut() -> None:
    turnstile = Turnstile()
    with turnstile.passed() as first:
        pass
    turnstile.shut()
    with turnstile.passed() as second:
        pass
    turnstile.shut()
    assert (first, second) == (True, False)

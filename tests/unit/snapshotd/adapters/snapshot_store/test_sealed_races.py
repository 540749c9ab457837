"""Readers of an encrypted snapshot who come, leave and give up while its files come to memory or leave it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from snapshotd.adapters.snapshot_store.directory import DirectoryStore
from snapshotd.adapters.snapshot_store.sealed import SealedStore
from snapshotd.failpoints import Failpoints
from snapshotd.model import Snapshot
from tests.unit.snapshotd.adapters.snapshot_store.sealed_world import CONTENT, SealedNode, capture, contents


@pytest.fixture
def node(tmp_path: Path) -> SealedNode:
    return SealedNode(tmp_path)


class Gate:
    """Work of the store in memory that is held where it begins until ``open`` is set.

    Attributes:
        reached: it has begun.
    """

    def __init__(self, store: DirectoryStore, method: str, patch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()
        work = getattr(store, method)

        async def gated(*arguments: object) -> None:
            self.reached.set()
            await self.open.wait()
            await work(*arguments)

        patch.setattr(store, method, gated)


async def read_by_one(store: SealedStore) -> Snapshot:
    """Capture ``s1``, and have ``one`` read it."""
    snapshot = await capture(store)
    store.pin("one", "s1")
    await store.images(snapshot)
    return snapshot


async def everybody_is_as_far_as_they_get() -> None:
    """Let the tasks run that wait for nothing but their turn."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_reader_who_comes_while_the_last_one_leaves_has_it(
    node: SealedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = node.open()
    snapshot = await read_by_one(store)
    removal = Gate(store.unsealed, "delete", monkeypatch)

    leaving = asyncio.create_task(store.unpin("one"))
    await removal.reached.wait()
    store.pin("two", "s1")
    reading = asyncio.create_task(store.images(snapshot))
    await everybody_is_as_far_as_they_get()
    removal.open.set()
    await leaving

    assert contents(await reading) == CONTENT


async def test_it_is_verified_whole_while_the_last_reader_leaves(
    node: SealedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = node.open()
    snapshot = await read_by_one(store)
    verification = Gate(store.unsealed, "verify", monkeypatch)

    verifying = asyncio.create_task(store.verify(snapshot, again=True))
    await verification.reached.wait()
    leaving = asyncio.create_task(store.unpin("one"))
    await everybody_is_as_far_as_they_get()
    verification.open.set()

    await verifying
    await leaving
    assert node.plain() == []


@pytest.mark.parametrize(
    "leave", [lambda store: store.unpin("one"), lambda store: store.delete("s1")], ids=["leaves", "deletes"]
)
async def test_who_gives_up_while_it_leaves_memory_leaves_nothing_there(
    node: SealedNode,
    monkeypatch: pytest.MonkeyPatch,
    leave: Callable[[SealedStore], Coroutine[Any, Any, None]],
) -> None:
    store = node.open()
    store.pin("one", "s1")
    await store.images(await capture(store))
    removal = Gate(store.unsealed, "delete", monkeypatch)

    leaving = asyncio.create_task(leave(store))
    await removal.reached.wait()
    leaving.cancel()
    removal.open.set()

    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert node.plain() == []


async def test_who_gives_up_while_it_is_unsealed_leaves_nothing_in_memory(node: SealedNode) -> None:
    reached = asyncio.Event()

    class Watched(Failpoints):
        def hit(self, name: str) -> None:
            if name == "fetch.chunk.after":
                reached.set()

    store = node.open(Watched())
    snapshot = await capture(store)
    store.pin("one", "s1")
    unsealing = asyncio.create_task(store.images(snapshot))
    await reached.wait()
    unsealing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unsealing
    await store.unpin("one")
    assert node.plain() == []

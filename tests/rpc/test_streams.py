"""A stream without an end of its own ends when its service drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dumont.errors import Unavailable
from dumont.rpc.streams import until_draining


async def watch(closed: asyncio.Event, *items: str) -> AsyncIterator[str]:
    try:
        for item in items:
            yield item
        await asyncio.Event().wait()
    finally:
        closed.set()


async def test_items_pass_until_the_drain_and_the_source_is_closed() -> None:
    draining, closed = asyncio.Event(), asyncio.Event()
    seen: list[str] = []

    async def read() -> None:
        async for item in until_draining(watch(closed, "one", "two"), draining):
            seen.append(item)
            if item == "two":
                draining.set()

    with pytest.raises(Unavailable) as ended:
        await read()

    assert seen == ["one", "two"]
    assert ended.value.reason == "SERVICE_DRAINING"
    await asyncio.wait_for(closed.wait(), 5)


async def test_a_source_that_ends_ends_the_stream() -> None:
    async def short() -> AsyncIterator[int]:
        yield 1
        yield 2

    assert [item async for item in until_draining(short(), asyncio.Event())] == [1, 2]

"""Streams that would never end by themselves: watches, and logs that are followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from dumont.errors import Unavailable

Item = TypeVar("Item")


async def until_draining(source: AsyncIterator[Item], draining: asyncio.Event) -> AsyncGenerator[Item]:
    """The items of ``source``, until the service drains: a drain waits for streams, so they must end.

    Raises:
        Unavailable: SERVICE_DRAINING; the caller may watch again once the service is back.
    """
    drained = asyncio.create_task(draining.wait())
    try:
        while True:
            item: asyncio.Task[Item] = asyncio.ensure_future(_next(source))
            try:
                await asyncio.wait({item, drained}, return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    message = "the service is ending; watch again once it is back"
                    raise Unavailable("SERVICE_DRAINING", message, retry_after=1.0)
                yield item.result()
            except StopAsyncIteration:
                return
            finally:
                item.cancel()
    finally:
        drained.cancel()


async def _next(source: AsyncIterator[Item]) -> Item:
    return await anext(source)

"""Await work to its end even when the caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

Result = TypeVar("Result")


async def to_completion(work: Awaitable[Result]) -> Result:
    """Await ``work`` and return only when it has ended, however often the caller is cancelled.

    Raises:
        asyncio.CancelledError: the caller was cancelled; the outcome of ``work`` is dropped.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if not task.cancelled():
            # Retrieved, or asyncio logs that it never was.
            task.exception()
        raise asyncio.CancelledError
    return task.result()


async def thread_to_completion(work: Callable[[], Result]) -> Result:
    """Run ``work`` in a thread and return only when it has ended, as :func:`to_completion` does.

    A thread cannot be stopped: one left behind would go on writing files that the unwinding removes.
    """
    return await to_completion(asyncio.to_thread(work))

"""Work that is waited for to its end, also by a caller who was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def finish(work: Callable[[], Result]) -> Result:
    """Run ``work`` in a thread. Also when cancelled, return only when it has ended.

    A thread cannot be stopped: one that is left behind would go on writing what the unwinding removes.
    """
    return await whole(asyncio.to_thread(work))


async def whole(work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for ``work``. Also when cancelled, return only when it has ended."""
    working = asyncio.create_task(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise

"""Blocking work in a thread, waited for to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def finish(work: Callable[[], Result]) -> Result:
    """Run ``work`` in a thread. Also when cancelled, return only when it has ended.

    A thread cannot be stopped: one that is left behind would go on writing what the unwinding removes.
    """
    working = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise

"""Retry calls that failed for a reason that may pass."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from dumont.errors import Unavailable

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How often a call is tried, and how long to wait in between.

    Attributes:
        attempts: the number of all attempts.
        first_seconds: the mean of the first wait. Each further one is twice as long.
        most_seconds: the longest wait.
    """

    attempts: int = 5
    first_seconds: float = 0.1
    most_seconds: float = 5.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until it succeeds. Errors other than ``Unavailable`` are raised at once."""
        for attempt in range(self.attempts - 1):
            try:
                return await call()
            except Unavailable:
                # Random, so that callers that failed together do not retry together.
                wait = min(self.most_seconds, self.first_seconds * 2**attempt)
                await self.sleep(wait * random.uniform(0.5, 1.5))
        return await call()

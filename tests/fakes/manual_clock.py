"""A clock that a test moves."""

from __future__ import annotations

import asyncio

from controller.model import Moment


class ManualClock:
    """Stands still until ``advance``; sleepers wake in the order of their times."""

    def __init__(self, wall: float = 1_700_000_000.0, monotonic: float = 1000.0) -> None:
        self._now = Moment(wall, monotonic)
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def moment(self) -> Moment:
        return self._now

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        sleeper = (self._now.monotonic + seconds, woken)
        self._sleepers.append(sleeper)
        try:
            await woken.wait()
        finally:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)

    def advance(self, seconds: float) -> None:
        """Move both clocks on."""
        self._now = Moment(self._now.wall + seconds, self._now.monotonic + seconds)
        for sleeper in sorted(self._sleepers, key=lambda s: s[0]):
            if sleeper[0] <= self._now.monotonic:
                self._sleepers.remove(sleeper)
                sleeper[1].set()

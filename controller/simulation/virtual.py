"""An event loop whose time jumps to the next timer as soon as nothing else is to be done."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

from controller.model import Moment

# Any time of the day will do.
BEGIN = 1_700_000_000.0


class _NoWait(selectors.SelectSelector):
    """Waits for nothing: the time to wait is added to the loop's clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that nothing will bring about")
        self.waited += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs asyncio code in virtual time, the same way every time."""

    def __init__(self) -> None:
        self._no_wait = _NoWait()
        super().__init__(self._no_wait)

    def time(self) -> float:
        """Seconds since the loop was made, in virtual time."""
        return self._no_wait.waited


class VirtualClock:
    """The ``Clock`` port in the time of the running loop."""

    def moment(self) -> Moment:
        now = asyncio.get_running_loop().time()
        return Moment(BEGIN + now, now)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

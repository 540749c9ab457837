"""The ``Clock`` port on the machine's clocks."""

from __future__ import annotations

import asyncio
import time

from controller.model import Moment


class SystemClock:
    """Wall time and the monotonic clock."""

    def moment(self) -> Moment:
        return Moment(time.time(), time.monotonic())

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

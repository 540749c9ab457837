"""Streams without an end of their own: watches, followed logs, and answers that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final, TypeVar

import grpc

from dumont.errors import Aborted, Unavailable

Item = TypeVar("Item")

# Seconds that a message of a stream may wait for its reader.
WRITE_SECONDS: Final = 60.0


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


class PatientWriter:
    """Writes the messages of a call, and releases what the call holds if its caller stops reading.

    gRPC accepts no status while a message waits for its reader. Therefore what the call holds is released
    first, and the status is sent after that message; never, if the caller does not read any more.

    Args:
        context: of the call.
        patience: seconds that a message may wait.
        give_back: called once if a message has waited for so long.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        patience: float,
        give_back: Callable[[], object],
    ) -> None:
        self._write = context.write
        self._patience = patience
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._stalled = False

    def __enter__(self) -> PatientWriter:
        self._timer = self._loop.call_later(self._patience, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    async def write(self, message: Any) -> None:
        """Send a message, when there is room for it. Raises: Aborted, STREAM_NOT_READ."""
        self._since = self._loop.time()
        await self._write(message)
        self._since = None
        if self._stalled:
            raise Aborted(
                "STREAM_NOT_READ",
                f"the caller read nothing of the answer for {self._patience:g} s, so the call was ended; "
                "read the answer as it comes, or cancel the call",
                metadata={"seconds": f"{self._patience:g}"},
            )

    def _look(self) -> None:
        # Checked from time to time rather than for each message, of which there may be thousands per second.
        waited = 0.0 if self._since is None else self._loop.time() - self._since
        if waited < self._patience:
            self._timer = self._loop.call_later(self._patience - waited, self._look)
        else:
            self._stalled = True
            self._give_back()

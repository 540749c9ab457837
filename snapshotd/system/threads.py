"""Threads for work that may never end, such as reads from a network mount that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from dumont.errors import Unavailable

Result = TypeVar("Result")

COUNT = 8
SECONDS = 30.0


class PatientThreads:
    """A bounded number of threads of their own, so that work that hangs delays only work of its kind.

    A thread that hangs cannot be ended. It occupies one of these threads, and does not keep the process from
    ending.

    Args:
        purpose: what the threads do, for errors and thread names.
        count: the number of threads.
        seconds: how long callers wait, for a thread and for their work together.
    """

    def __init__(self, purpose: str, count: int = COUNT, seconds: float = SECONDS) -> None:
        self.purpose = purpose
        self.seconds = seconds
        self._places = asyncio.Semaphore(count)

    async def run(self, work: Callable[[], Result], seconds: float | None = None) -> Result:
        """Run ``work`` in a thread, and return or raise what it does.

        Args:
            seconds: how long to wait; None for the usual time.

        Raises:
            Unavailable: FILES_HANG, it did not end in time, or no thread was free.
        """
        seconds = self.seconds if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                await self._places.acquire()
                return await self._start(work)
        except TimeoutError:
            raise Unavailable(
                "FILES_HANG",
                f"{self.purpose} gave no answer within {seconds:g} s; see whether a disk or a mount hangs",
                metadata={"purpose": self.purpose},
            ) from None

    def _start(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()

        def settle(result: Result | None, error: BaseException | None) -> None:
            self._places.release()
            if answer.done():  # the caller no longer waits
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except BaseException as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the daemon has ended
                loop.call_soon_threadsafe(settle, result, failure)

        threading.Thread(target=run, name=self.purpose, daemon=True).start()
        return answer

"""Threads for work that may never end, such as reads from a network mount that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from dumont.errors import Unavailable

Result = TypeVar("Result")

COUNT = 16
# Threads for one subject, which would otherwise take all of them, one with each try.
COUNT_OF_ONE = 2
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
        # Kept by who waits for a place or has one.
        self._places_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(
        self, work: Callable[[], Result], seconds: float | None = None, *, subject: str = ""
    ) -> Result:
        """Run ``work`` in a thread, and return or raise what it does.

        Args:
            seconds: how long to wait; None for the usual time.
            subject: what hangs if the work does, such as a directory. At most ``COUNT_OF_ONE``
                threads work on one subject at a time. Empty: no other work shares it.

        Raises:
            Unavailable: FILES_HANG, it did not end in time, or no thread was free.
        """
        seconds = self.seconds if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                own = self._place_of(subject)
                await own.acquire()
                try:
                    await self._places.acquire()
                except BaseException:
                    own.release()
                    raise
                return await self._start(work, own)
        except TimeoutError:
            raise Unavailable(
                "FILES_HANG",
                f"{self.purpose} gave no answer within {seconds:g} s; see whether a disk or a mount hangs",
                metadata={"purpose": self.purpose},
            ) from None

    def _place_of(self, subject: str) -> asyncio.Semaphore:
        own = self._places_of.get(subject)
        if own is None:
            own = asyncio.Semaphore(COUNT_OF_ONE)
            if subject:
                self._places_of[subject] = own
        return own

    def _start(self, work: Callable[[], Result], own: asyncio.Semaphore) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()

        def settle(result: Result | None, error: BaseException | None) -> None:
            own.release()
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

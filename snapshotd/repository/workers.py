"""Bounded work: so many items in flight, whatever their number."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from dumont.aio import to_completion
from snapshotd.repository.ports import ByteProgress

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Limits:
    """How much of an upload or a fetch is done at once.

    Attributes:
        calls: to the store, besides those that read chunks.
        chunks: in flight, on the wire or in work; each takes up to 24 MiB.
        threads: that hash, compress and encrypt, or unpack what others read.
    """

    calls: int
    chunks: int
    threads: int

    @classmethod
    def of(cls, cores: int) -> Limits:
        """What keeps so many cores busy, in no more than 336 MiB."""
        threads = min(cores, 12)
        calls = max(8, threads)
        # More than calls: while chunks are unpacked others must be on their way, or the store waits.
        return cls(calls, calls + min(threads, 2), threads)


class Workers:
    """Tasks that wait on the store, and threads that hash, compress and encrypt for them.

    Args:
        count: items in flight at once; each holds a few chunks' worth of memory.
        threads: threads for work that keeps a core busy, and how many that read may keep one busy.

    Attributes:
        cores: to be held by a thread of :meth:`wait` while it keeps a core busy.
    """

    def __init__(self, count: int, threads: int) -> None:
        self.count = count
        self.threads = threads
        # As many of these as keep the cores busy are at work.
        self.cores = threading.Semaphore(threads)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="store")
        self._readers = ThreadPoolExecutor(count, thread_name_prefix="store-read")

    async def each(self, items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Do ``work`` for every item; the first error ends the rest and is raised."""
        source = iter(items)

        async def worker() -> None:
            # All workers draw from one iterator: an item is taken only when a worker is free for it.
            for item in source:
                await work(item)

        tasks = [asyncio.create_task(worker()) for _ in range(self.count)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            # Also when cancelled, which then goes on: what a worker raises on its way out must not hide it.
            for task in tasks:
                task.cancel()
            await to_completion(asyncio.wait(tasks))
        for task in done:
            task.result()

    async def compute(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in a thread, to its end: nobody takes its files away while it writes to them."""
        return await to_completion(asyncio.wrap_future(self._threads.submit(work, *args, **kwargs)))

    def wait(self, work: Callable[[], T]) -> Awaitable[T]:
        """Run ``work``, which mostly waits, in a thread; whoever is cancelled leaves it to go on."""
        return asyncio.wrap_future(self._readers.submit(work))

    def close(self) -> None:
        for threads in (self._threads, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)


class Turnstile:
    """Lets threads in until it is shut; nobody is inside any more when that is done."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    @contextlib.contextmanager
    def passed(self) -> Iterator[bool]:
        """Whether this thread is inside, or came too late."""
        with self._changed:
            let_in = not self._shut
            self._inside += let_in
        try:
            yield let_in
        finally:
            with self._changed:
                self._inside -= let_in
                self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in any more, and wait for those inside."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: not self._inside)


class Counter:
    """Adds up what several workers have done and tells it."""

    def __init__(self, total: int, progress: ByteProgress) -> None:
        self.done = 0
        self.total = total
        self._progress = progress
        progress(0, total)

    def add(self, count: int) -> None:
        self.done += count
        self._progress(self.done, self.total)

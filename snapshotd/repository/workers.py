"""Run work for many items with a bounded number of them in flight."""

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
        calls: calls to the object store, besides those that read chunks.
        chunks: chunks that are on the wire or being worked on; each takes up to 24 MiB.
        threads: threads that hash, compress and encrypt, or unpack.
    """

    calls: int
    chunks: int
    threads: int

    @classmethod
    def of(cls, cores: int) -> Limits:
        """The limits that keep a number of cores busy, in no more than 336 MiB."""
        threads = min(cores, 12)
        calls = max(8, threads)
        # More than calls, so that chunks are on their way while others are unpacked.
        return cls(calls, calls + min(threads, 2), threads)


class Workers:
    """Tasks that wait for the object store, and threads that hash, compress and encrypt for them.

    Args:
        count: items in flight at once; each takes the memory of a few chunks.
        threads: threads that keep a core busy at once, in :meth:`compute` or while they hold ``cores``.

    Attributes:
        cores: a thread of :meth:`wait` holds it while it keeps a core busy.
    """

    def __init__(self, count: int, threads: int) -> None:
        self.count = count
        self.threads = threads
        # Bounds the threads of ``_readers`` that compute at the same time.
        self.cores = threading.Semaphore(threads)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="store")
        self._readers = ThreadPoolExecutor(count, thread_name_prefix="store-read")

    async def each(self, items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Do ``work`` for every item. The first error cancels the rest and is raised."""
        source = iter(items)

        async def worker() -> None:
            # All workers share one iterator, so that an item is taken only when a worker is free.
            for item in source:
                await work(item)

        tasks = [asyncio.create_task(worker()) for _ in range(self.count)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            # Also after a cancellation, which an error that a worker raises as it ends must not hide.
            for task in tasks:
                task.cancel()
            await to_completion(asyncio.wait(tasks))
        for task in done:
            task.result()

    async def compute(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in a thread, and return only when it has ended, even if cancelled.

        So nobody removes files while it writes to them.
        """
        return await to_completion(asyncio.wrap_future(self._threads.submit(work, *args, **kwargs)))

    def wait(self, work: Callable[[], T]) -> Awaitable[T]:
        """Run ``work``, which mostly waits, in a thread. If the caller is cancelled, the thread goes on."""
        return asyncio.wrap_future(self._readers.submit(work))

    def close(self) -> None:
        """End the threads once their current work is done."""
        for threads in (self._threads, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)


class Turnstile:
    """Admits threads until it is shut, which waits until all of them have left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    @contextlib.contextmanager
    def passed(self) -> Iterator[bool]:
        """Enter; the value is False if the turnstile is shut already."""
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
        """Admit no more threads, and wait for those inside."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: not self._inside)


class Counter:
    """Adds up the bytes that several workers have done, and reports them."""

    def __init__(self, total: int, progress: ByteProgress) -> None:
        self.done = 0
        self.total = total
        self._progress = progress
        progress(0, total)

    def add(self, count: int) -> None:
        """Report ``count`` more bytes."""
        self.done += count
        self._progress(self.done, self.total)

"""One computing thread behind a bounded queue.

A job is an iterator that the computing thread drives; between two of its items the job can be stopped, so
that a caller who left costs at most one more step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar, cast

from dumont.errors import Cancelled, DeadlineExceeded, DumontError, Internal, ResourceExhausted

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_AFTER: Final = 1.0
END: Final = object()


class Job(Generic[T]):
    """Work handed to the computing thread. Iterate over it to receive its items as they come.

    Raises, while iterating:
        Cancelled, DeadlineExceeded: it was stopped.
        DumontError: what the work raised; anything else it raised arrives as Internal.
    """

    def __init__(
        self, steps: Callable[[], Iterator[T]], deadline: float | None, withdraw: Callable[[Job[Any]], None]
    ) -> None:
        self.steps = steps
        self.deadline = deadline
        self.cancelled = threading.Event()
        self._withdraw = withdraw
        self._items: SimpleQueue[object] = SimpleQueue()

    def cancel(self) -> None:
        """Stop before the next step. A job still in the queue leaves it now."""
        self.cancelled.set()
        self._withdraw(self)

    def put(self, item: object) -> None:
        self._items.put(item)

    def __iter__(self) -> Iterator[T]:
        while (item := self._items.get()) is not END:
            if isinstance(item, BaseException):
                raise item
            yield cast(T, item)


class Scheduler:
    """Runs jobs one at a time, first come first served.

    Args:
        max_queue: jobs that may wait, the running one not counted.
        clock: monotonic seconds, the same that deadlines are given in.
    """

    def __init__(self, max_queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_queue = max_queue
        self._clock = clock
        self._waiting: deque[Job[Any]] = deque()
        self._changed = threading.Condition()
        self._running: Job[Any] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Jobs waiting."""
        return len(self._waiting)

    def submit(self, steps: Callable[[], Iterator[T]], deadline: float | None = None) -> Job[T]:
        """Queue a job.

        Args:
            steps: makes the iterator, on the computing thread.
            deadline: on this scheduler's clock; the job stops at the first step after it.

        Raises:
            ResourceExhausted: QUEUE_FULL.
        """
        job = Job(steps, deadline, self._withdraw)
        with self._changed:
            if len(self._waiting) >= self._max_queue:
                raise ResourceExhausted(
                    "QUEUE_FULL",
                    f"{self._max_queue} calls are waiting for this instance already; call again later.",
                    metadata={"max_queue": str(self._max_queue)},
                    retry_after=RETRY_AFTER,
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the computing thread ahead of the queue, wait, and give what it returned."""
        job: Job[T] = Job(lambda: iter((function(),)), None, self._withdraw)
        with self._changed:
            self._waiting.appendleft(job)
            self._changed.notify()
        return next(iter(job))

    def close(self) -> None:
        """Cancel everything, let the running step end, and end the thread."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify()
        for job in jobs:
            job.cancel()
        self._thread.join()

    def _withdraw(self, job: Job[Any]) -> None:
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.put(_cancelled())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = self._waiting.popleft()
            self._drive(self._running)
            self._running = None  # nothing of it may live on while the thread waits: it holds a prompt

    def _drive(self, job: Job[Any]) -> None:
        try:
            self._check(job)
            steps = job.steps()
            try:
                for item in steps:
                    job.put(item)
                    self._check(job)
            finally:
                if close := getattr(steps, "close", None):
                    close()
            job.put(END)
        except DumontError as error:
            job.put(error)
        except Exception as error:
            log.exception("a computation failed")
            job.put(_internal(error))

    def _check(self, job: Job[Any]) -> None:
        if job.cancelled.is_set():
            raise _cancelled()
        if job.deadline is not None and self._clock() >= job.deadline:
            raise DeadlineExceeded(
                "DEADLINE_EXCEEDED", "The caller's time was up before the answer was done."
            )


def _cancelled() -> Cancelled:
    return Cancelled("CANCELLED", "The caller gave up.")


def _internal(error: Exception) -> Internal:
    return Internal(
        "COMPUTE_FAILED", f"The model failed to compute: {type(error).__name__}; see the host's log."
    )

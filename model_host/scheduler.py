"""One computing thread, which steps the engine for all requests together.

Requests wait in a bounded queue, in order of arrival, until the engine has room for the first of them.
Between two steps the thread admits, ends what was cancelled or is out of time, and runs what the host asks
for. A caller reads what was computed from its job, at its own pace: a reader that is slow, or never reads,
holds up nobody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

from dumont.errors import Cancelled, DeadlineExceeded, DumontError, Internal, ResourceExhausted, Unavailable
from model_host.engine import DeviceLost, Engine, Load, Work

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_AFTER: Final = 1.0
# Seconds between two messages of a stream. Its first token never waits; a later one waits at most this long,
# so that what is ready together is sent together.
SEND_INTERVAL: Final = 0.02


class Job:
    """Work handed to the computing thread. Iterate over it to receive what it computes.

    Raises, while iterating:
        Cancelled, DeadlineExceeded: it was stopped.
        DumontError: what the work raised; anything else it raised arrives as Internal.
    """

    def __init__(
        self,
        work: Work,
        deadline: float | None,
        changed: Callable[[], None],
        urgent: Callable[[], None] | None = None,
    ) -> None:
        self.work = work
        self.deadline = deadline
        self.cancelled = False
        self._computed: list[Any] = []
        self._failure: BaseException | None = None
        self._ended = False
        self._arrived = threading.Condition()
        # Whether the next item wakes the reader. If not, only the end does, until its interval is over: a
        # thread that woke for each token would take the interpreter from the one that computes.
        self._hungry = True
        self._changed = changed
        self._urgent = urgent

    def cancel(self) -> None:
        """Stop before the next step. A job still in the queue leaves it now."""
        self.cancelled = True
        self._changed()

    def put(self, item: Any) -> None:
        """Add something that was computed."""
        with self._arrived:
            if self._ended:
                return
            self._computed.append(item)
            hungry, self._hungry = self._hungry, False
            if hungry:
                self._arrived.notify()
        if hungry and self._urgent is not None:
            self._urgent()

    def end(self, failure: BaseException | None = None) -> None:
        """Say that nothing more will come, and why, if the work did not finish."""
        with self._arrived:
            if self._ended:
                return
            self._ended, self._failure = True, failure
            self._arrived.notify()
        if self._urgent is not None:
            self._urgent()

    def take(self) -> tuple[list[Any], bool, BaseException | None]:
        """What was computed since the last call, whether that is all, and why, if the work did not finish."""
        with self._arrived:
            computed, self._computed = self._computed, []
            return computed, self._ended, self._failure

    def __iter__(self) -> Iterator[Any]:
        """What the caller is sent, as it becomes ready; later tokens several at a time."""
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._computed or self._ended)
            computed, ended, failure = self.take()
            if computed:
                reply = self.work.receive(computed)
                yield from reply.items
                if reply.ended:
                    self.cancel()
                    return
            if ended:
                if failure is not None:
                    raise failure
                return
            with self._arrived:
                self._arrived.wait_for(lambda: self._ended, SEND_INTERVAL)
                self._hungry = not self._computed


class _Errand(Generic[T]):
    """A function that the host wants run on the computing thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._done = threading.Event()
        self._result: T | None = None
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._failure = error
        self._done.set()

    def wait(self) -> T:
        self._done.wait()
        if self._failure is None:
            return self._result  # type: ignore[return-value]
        if isinstance(self._failure, DumontError):
            raise self._failure
        log.error("a computation failed", exc_info=self._failure)
        raise _internal(self._failure) from self._failure


class Scheduler:
    """Steps one engine for many jobs, admitted first come first served.

    Args:
        max_queue: jobs that may wait, not counting those admitted.
        clock: monotonic seconds, the same that deadlines are given in.
        lost: called when the engine can compute no more in this process.
    """

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        clock: Callable[[], float] = time.monotonic,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._lost = lost
        self._max_queue = max_queue
        self._clock = clock
        self._waiting: deque[Job] = deque()
        self._errands: deque[_Errand[Any]] = deque()
        self._changed = threading.Condition()
        self._running: dict[Work, Job] = {}
        # Whether something happened that the thread must look at between two steps.
        self._stirred = False
        self._closed = False
        # Only the computing thread changes it.
        self._held = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Jobs waiting."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs admitted."""
        return len(self._running)

    @property
    def load(self) -> Load:
        """How much of the engine's capacity is in use."""
        return self._engine.load

    def submit(
        self, work: Work, deadline: float | None = None, urgent: Callable[[], None] | None = None
    ) -> Job:
        """Queue work.

        Args:
            deadline: on this scheduler's clock; the job ends at the first step after it.
            urgent: for a reader that polls ``Job.take``: called on the computing thread when the job has
                something that must not wait, which is its first item and its end.

        Raises:
            ResourceExhausted: QUEUE_FULL.
        """
        job = Job(work, deadline, self._stir, urgent)
        with self._changed:
            # Those that the next step admits do not wait for room, only for the computing thread.
            room = max(self._engine.capacity.sequences - len(self._running), 0)
            if len(self._waiting) >= self._max_queue + room:
                raise ResourceExhausted(
                    "QUEUE_FULL",
                    f"{self._max_queue} calls are already waiting for this instance; call again later.",
                    metadata={"max_queue": str(self._max_queue)},
                    retry_after=RETRY_AFTER,
                )
            self._waiting.append(job)
            self._stirred = True
            self._changed.notify()
        return job

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the computing thread between two steps, wait for it, and return its result."""
        errand = _Errand(function)
        with self._changed:
            self._errands.append(errand)
            self._stirred = True
            self._changed.notify()
        return errand.wait()

    def hold(self, function: Callable[[], object]) -> None:
        """Run ``function`` as ``call`` does, and step no more until ``release``; jobs wait meanwhile."""

        def work() -> None:
            function()
            self._held = True

        self.call(work)

    def release(self, function: Callable[[], object]) -> None:
        """Run ``function`` as ``call`` does, and step on."""

        def work() -> None:
            function()
            self._held = False

        self.call(work)

    def close(self) -> None:
        """Cancel everything, let the running step end, and end the thread."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *self._running.values()]:
                job.cancelled = True
            self._stirred = True
            self._changed.notify()
        self._thread.join()

    def _stir(self) -> None:
        with self._changed:
            self._stirred = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stirred or (self._running and not self._held) or self._closed,
                    None if self._held else self._until_deadline(),
                )
                if self._closed and not (self._waiting or self._running or self._errands):
                    return
                errands = list(self._errands)
                self._errands.clear()
                stirred, self._stirred = self._stirred, False
            for errand in errands:
                errand.run()
            if self._held:
                if self._closed:
                    # The engine cannot be asked to drop anything: it may have no device now.
                    self._end_all(Cancelled("CANCELLED", "The instance was stopped."))
                continue
            try:
                self._end_the_late(look_at_all=stirred)
                self._admit()
                if self._running:
                    self._step()
            except DeviceLost as error:
                self._give_up(error)
            except Exception as error:
                # Without this thread, every caller would wait for ever.
                self._end_all(_as_dumont(error))

    def _until_deadline(self) -> float | None:
        """Seconds until the first waiting job is out of time; only asked while nothing runs."""
        deadlines = [job.deadline for job in self._waiting if job.deadline is not None]
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _end_the_late(self, look_at_all: bool) -> None:
        """End the jobs that were cancelled or whose deadline has passed."""
        now = self._clock()
        for work, job in list(self._running.items()):
            if (failure := _stopped(job, now)) is not None:
                self._engine.drop(work)
                del self._running[work]
                job.end(failure)
        if look_at_all or self._waiting:
            with self._changed:
                late = [(job, failure) for job in self._waiting if (failure := _stopped(job, now))]
                for job, _ in late:
                    self._waiting.remove(job)
            for job, failure in late:
                job.end(failure)

    def _admit(self) -> None:
        """Admit waiting jobs, first come first served, as long as there is room."""
        while self._waiting:
            job = self._waiting[0]
            try:
                if not self._engine.admit(job.work):
                    return
            except DeviceLost:
                raise
            except Exception as error:
                self._waiting.popleft()
                job.end(_as_dumont(error))
                continue
            self._running[job.work] = job
            with self._changed:
                self._waiting.popleft()

    def _step(self) -> None:
        try:
            outputs: Sequence[Any] = self._engine.step()
        except DeviceLost:
            raise
        except Exception as error:
            # The engine could not say whose fault it was.
            failure = _as_dumont(error)
            for work, job in self._running.items():
                self._engine.drop(work)
                job.end(failure)
            self._running.clear()
            self._stirred = True
            return
        for output in outputs:
            job = self._running.get(output.work)  # type: ignore[assignment]
            if job is None:
                continue
            if isinstance(output.item, BaseException):
                job.end(_as_dumont(output.item))
            else:
                job.put(output.item)
                if output.last:
                    job.end()
            if output.last or isinstance(output.item, BaseException):
                del self._running[output.work]
                self._stirred = True  # a waiting job may have room now

    def _give_up(self, error: DeviceLost) -> None:
        """End all jobs, those that wait as well: another process may answer them."""
        log.error("nothing can be computed any more: %s", error)
        self._end_all(
            Unavailable(
                "DEVICE_LOST", f"The model host cannot use its device any more ({error}).", retry_after=0.2
            )
        )
        self._lost()

    def _end_all(self, failure: DumontError) -> None:
        """End all jobs, those that wait as well."""
        with self._changed:
            jobs = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for job in jobs:
            job.end(failure)


def _stopped(job: Job, now: float) -> DumontError | None:
    if job.cancelled:
        return Cancelled("CANCELLED", "The caller gave up.")
    if job.deadline is not None and now >= job.deadline:
        return DeadlineExceeded("DEADLINE_EXCEEDED", "The caller's time was up before the answer was done.")
    return None


def _as_dumont(error: BaseException) -> DumontError:
    if isinstance(error, DumontError):
        return error
    log.error("a computation failed", exc_info=error)
    return _internal(error)


def _internal(error: BaseException) -> Internal:
    return Internal(
        "COMPUTE_FAILED", f"The model failed to compute: {type(error).__name__}; see the host's log."
    )

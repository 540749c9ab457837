"""One computing thread, a bounded queue, and callers who may leave at any moment."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from dumont.errors import Cancelled, DeadlineExceeded, InvalidArgument, ResourceExhausted
from dumont.errors import Internal as InternalError
from model_host.scheduler import Job, Scheduler


class Steps:
    """Work whose every step waits to be allowed, and which says how far it came."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.done = 0
        self.started = threading.Event()
        self.closed = threading.Event()
        self.allowed = threading.Semaphore(0)

    def __call__(self) -> Iterator[int]:
        self.started.set()
        try:
            for step in range(self.count):
                self.allowed.acquire()
                self.done = step + 1
                yield step
        finally:
            self.closed.set()

    def allow(self, steps: int = 1000) -> None:
        self.allowed.release(steps)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scheduler(clock: Clock) -> Iterator[Scheduler]:
    made = Scheduler(max_queue=2, clock=clock)
    yield made
    made.close()


def occupy(scheduler: Scheduler) -> tuple[Steps, Job[int]]:
    """Have the computing thread busy with work that does not go on by itself."""
    steps = Steps(5)
    job = scheduler.submit(steps)
    assert steps.started.wait(5)
    return steps, job


def test_items_arrive_in_order_while_they_are_computed(scheduler: Scheduler) -> None:
    steps, job = occupy(scheduler)
    items = iter(job)

    steps.allow(1)

    assert next(items) == 0
    assert steps.done == 1
    steps.allow()
    assert list(items) == [1, 2, 3, 4]


def test_jobs_run_first_come_first_served(scheduler: Scheduler) -> None:
    order: list[str] = []
    steps, _ = occupy(scheduler)
    jobs = [scheduler.submit(lambda name=name: iter([order.append(name)])) for name in "ab"]

    steps.allow()

    assert [list(job) for job in jobs] == [[None], [None]]
    assert order == ["a", "b"]


def test_a_full_queue_refuses_and_says_when_to_come_back(scheduler: Scheduler) -> None:
    steps, _ = occupy(scheduler)
    waiting = [scheduler.submit(Steps(0)) for _ in range(2)]
    assert scheduler.queued == 2

    with pytest.raises(ResourceExhausted) as full:
        scheduler.submit(Steps(0))

    assert full.value.reason == "QUEUE_FULL"
    assert full.value.retry_after
    steps.allow()
    assert [list(job) for job in waiting] == [[], []]


def test_a_cancelled_job_leaves_the_queue_at_once(scheduler: Scheduler) -> None:
    steps, _ = occupy(scheduler)
    never = Steps(1)
    job = scheduler.submit(never)

    job.cancel()

    assert scheduler.queued == 0
    with pytest.raises(Cancelled):
        list(job)
    steps.allow()
    assert scheduler.call(never.started.is_set) is False


def test_a_cancelled_job_stops_computing_at_the_next_step(scheduler: Scheduler) -> None:
    steps, job = occupy(scheduler)

    job.cancel()
    steps.allow()

    with pytest.raises(Cancelled):
        list(job)
    assert steps.closed.wait(5)
    assert steps.done == 1


def test_a_job_whose_time_was_up_in_the_queue_is_never_begun(scheduler: Scheduler, clock: Clock) -> None:
    steps, _ = occupy(scheduler)
    late = Steps(1)
    job = scheduler.submit(late, deadline=10.0)

    clock.now = 10.0
    steps.allow()

    with pytest.raises(DeadlineExceeded):
        list(job)
    assert not late.started.is_set()


def test_a_running_job_stops_when_its_time_is_up(scheduler: Scheduler, clock: Clock) -> None:
    steps = Steps(5)
    job = scheduler.submit(steps, deadline=10.0)
    items = iter(job)
    steps.allow(1)
    assert next(items) == 0

    clock.now = 11.0
    steps.allow()

    with pytest.raises(DeadlineExceeded):
        list(items)
    assert steps.closed.wait(5)
    assert steps.done < steps.count


def test_the_computing_thread_survives_errors(scheduler: Scheduler) -> None:
    def wrong() -> Iterator[int]:
        raise InvalidArgument("WRONG", "as the caller made it")

    def broken() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("secret")

    with pytest.raises(InvalidArgument, match="as the caller made it"):
        list(scheduler.submit(wrong))
    with pytest.raises(InternalError) as failed:
        list(scheduler.submit(broken))

    assert failed.value.reason == "COMPUTE_FAILED"
    assert "secret" not in failed.value.message
    assert scheduler.call(lambda: 7) == 7


def test_the_hosts_own_work_goes_ahead_of_the_queue(scheduler: Scheduler) -> None:
    order: list[str] = []
    steps, _ = occupy(scheduler)
    queued = scheduler.submit(lambda: iter([order.append("caller")]))
    own = threading.Thread(target=lambda: scheduler.call(lambda: order.append("host")))
    own.start()
    while scheduler.queued < 2:
        os.sched_yield()

    steps.allow()
    list(queued)
    own.join(5)

    assert order == ["host", "caller"]


def test_closing_cancels_what_waits_and_what_runs(clock: Clock) -> None:
    scheduler = Scheduler(max_queue=2, clock=clock)
    steps, running = occupy(scheduler)
    waiting = scheduler.submit(Steps(1))
    steps.allow(1)

    scheduler.close()

    with pytest.raises(Cancelled):
        list(waiting)
    with pytest.raises(Cancelled):
        list(running)
    assert steps.done < steps.count

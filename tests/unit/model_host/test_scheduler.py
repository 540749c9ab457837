"""One computing thread that steps all requests together, a bounded queue, and callers who may leave."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from dumont.errors import Cancelled, DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from dumont.errors import Internal as InternalError
from model_host.engine import DeviceLost, Load, Reply, Work
from model_host.scheduler import Job, Scheduler
from tests.fakes.step_engine import Hold, Script, StepEngine

ROOM = 2


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine() -> StepEngine:
    return StepEngine(sequences=ROOM)


@pytest.fixture
def scheduler(engine: StepEngine, clock: Clock) -> Iterator[Scheduler]:
    made = Scheduler(engine, max_queue=3, clock=clock)
    yield made
    made.close()


def occupy(scheduler: Scheduler, *items: Any) -> tuple[Hold, Job]:
    """Have the computing thread in the middle of a step, and all room taken."""
    hold = Hold()
    job = scheduler.submit(Script([hold, *(items or (0,))]))
    assert hold.reached.wait(5)
    for _ in range(ROOM - 1):
        scheduler.submit(Script([1]))
    return hold, job


def together(scheduler: Scheduler, *scripts: Script, deadline: float | None = None) -> list[Job]:
    """Submit works that are admitted before the same step; the deadline is the last one's."""
    deadlines = [*[None] * (len(scripts) - 1), deadline]
    return scheduler.call(lambda: list(map(scheduler.submit, scripts, deadlines)))


def settle(scheduler: Scheduler) -> None:
    """Wait until what was submitted or cancelled before has been looked at, and a step made."""
    for _ in range(2):
        scheduler.call(lambda: None)


def test_items_arrive_in_order_while_others_are_computed(scheduler: Scheduler) -> None:
    hold = Hold()
    items = iter(scheduler.submit(Script([0, hold, 1, 2, 3])))

    assert next(items) == 0
    assert hold.reached.wait(5)
    hold.go_on()

    assert list(items) == [1, 2, 3]


def test_jobs_are_stepped_together_as_far_as_there_is_room(scheduler: Scheduler, engine: StepEngine) -> None:
    hold = Hold()
    one, other, third = Script([hold, 0, 1, 2]), Script([10, 11]), Script([20, 21])
    jobs = [scheduler.submit(one)]
    assert hold.reached.wait(5)
    jobs += [scheduler.submit(other), scheduler.submit(third)]

    hold.go_on()

    assert [list(job) for job in jobs] == [[0, 1, 2], [10, 11], [20, 21]]
    # The third came in when the second had left.
    assert engine.steps == [[one], [one, other], [one, other], [third], [third]]


def test_jobs_are_admitted_first_come_first_served(scheduler: Scheduler, engine: StepEngine) -> None:
    hold, _ = occupy(scheduler)
    scripts = [Script([number, number]) for number in range(2)]
    jobs = [scheduler.submit(script) for script in scripts]

    hold.go_on()

    assert [list(job) for job in jobs] == [[0, 0], [1, 1]]
    assert engine.admitted[ROOM:] == scripts


def test_one_that_does_not_fit_holds_back_those_behind_it(scheduler: Scheduler, engine: StepEngine) -> None:
    # given no room for the first in the queue
    hold, _ = occupy(scheduler)
    first, second = Script([1]), Script([2])
    admit = engine.admit
    fits = threading.Event()
    engine.admit = lambda work: (work is not first or fits.is_set()) and admit(work)  # type: ignore[method-assign]
    waiting = [scheduler.submit(first), scheduler.submit(second)]

    # when there is room for the second
    hold.go_on()
    settle(scheduler)

    # then it waits all the same
    assert (scheduler.running, scheduler.queued) == (0, 2)
    fits.set()
    settle(scheduler)
    assert [list(job) for job in waiting] == [[1], [2]]
    assert engine.admitted[-2:] == [first, second]


def test_a_full_queue_refuses_and_says_when_to_come_back(scheduler: Scheduler) -> None:
    hold, _ = occupy(scheduler)
    waiting = [scheduler.submit(Script([number])) for number in range(3)]
    assert scheduler.queued == 4  # one of them has room already

    with pytest.raises(ResourceExhausted) as full:
        scheduler.submit(Script([0]))

    assert full.value.reason == "QUEUE_FULL"
    assert full.value.retry_after
    hold.go_on()
    assert [list(job) for job in waiting] == [[0], [1], [2]]


def test_a_job_cancelled_in_the_queue_is_never_begun(scheduler: Scheduler, engine: StepEngine) -> None:
    hold, running = occupy(scheduler)
    never = Script([1])
    job = scheduler.submit(never)

    job.cancel()
    hold.go_on()

    with pytest.raises(Cancelled):
        list(job)
    assert list(running) == [0]
    settle(scheduler)
    assert never not in engine.admitted
    assert scheduler.queued == 0


def test_a_cancelled_job_stops_at_the_next_step_and_others_go_on(
    scheduler: Scheduler, engine: StepEngine
) -> None:
    hold = Hold()
    stays, leaves = Script([0, hold, 1, 2]), Script([10, 11, 12, 13])
    staying, leaving = together(scheduler, stays, leaves)
    assert hold.reached.wait(5)

    leaving.cancel()
    hold.go_on()

    with pytest.raises(Cancelled):
        list(leaving)
    assert list(staying) == [0, 1, 2]
    assert engine.dropped == [leaves]
    assert not leaves.finished


def test_a_job_whose_time_was_up_in_the_queue_is_never_begun(
    scheduler: Scheduler, engine: StepEngine, clock: Clock
) -> None:
    hold, _ = occupy(scheduler)
    late = Script([1])
    job = scheduler.submit(late, deadline=10.0)

    clock.now = 10.0
    hold.go_on()

    with pytest.raises(DeadlineExceeded):
        list(job)
    assert late not in engine.admitted


def test_a_running_job_stops_when_its_time_is_up_and_others_go_on(
    scheduler: Scheduler, engine: StepEngine, clock: Clock
) -> None:
    hold = Hold()
    stays, ends = Script([0, hold, 1, 2]), Script([10, 11, 12, 13])
    staying, ending = together(scheduler, stays, ends, deadline=10.0)
    assert hold.reached.wait(5)

    clock.now = 11.0
    hold.go_on()

    with pytest.raises(DeadlineExceeded):
        list(ending)
    assert list(staying) == [0, 1, 2]
    assert engine.dropped == [ends]
    assert not ends.finished


def test_a_job_that_fails_ends_alone(scheduler: Scheduler) -> None:
    hold = Hold()
    sound = scheduler.submit(Script([hold, 0, 1, 2]))
    assert hold.reached.wait(5)
    wrong = scheduler.submit(Script([10, InvalidArgument("WRONG", "as the caller made it"), 12]))

    hold.go_on()

    with pytest.raises(InvalidArgument, match="as the caller made it"):
        list(wrong)
    assert list(sound) == [0, 1, 2]


def test_a_defect_is_told_without_its_details(scheduler: Scheduler) -> None:
    with pytest.raises(InternalError) as failed:
        list(scheduler.submit(Script([1, ZeroDivisionError("secret")])))

    assert failed.value.reason == "COMPUTE_FAILED"
    assert "secret" not in failed.value.message


def test_what_cannot_be_admitted_ends_alone(scheduler: Scheduler, engine: StepEngine) -> None:
    hold, running = occupy(scheduler)
    never, sound = Script([1]), Script([2])
    engine.refused[never] = ResourceExhausted("NO_MEMORY", "none is left")
    refused, behind = scheduler.submit(never), scheduler.submit(sound)

    hold.go_on()

    with pytest.raises(ResourceExhausted, match="none is left"):
        list(refused)
    assert (list(running), list(behind)) == ([0], [2])


def test_a_step_that_raises_ends_all_in_it_and_the_next_work_runs(
    scheduler: Scheduler, engine: StepEngine
) -> None:
    hold = Hold()
    scripts = [Script([0, hold, 1, 2]), Script([10, 11, 12])]
    jobs = together(scheduler, *scripts)
    assert hold.reached.wait(5)
    waiting = scheduler.submit(Script([7]))

    engine.broken = ZeroDivisionError("secret")
    hold.go_on()

    for job in jobs:
        with pytest.raises(InternalError) as failed:
            list(job)
        assert failed.value.reason == "COMPUTE_FAILED"
        assert "secret" not in failed.value.message
    assert list(waiting) == [7]
    assert engine.load.sequences == 0


def test_while_it_is_held_nothing_is_stepped_and_then_all_goes_on(
    scheduler: Scheduler, engine: StepEngine
) -> None:
    # given: one that is computed
    hold, running = occupy(scheduler, 0, 1, 2)
    seen: list[str] = []
    holding = threading.Thread(target=lambda: scheduler.hold(lambda: seen.append("pause")))
    holding.start()
    hold.go_on()
    holding.join(5)
    assert seen == ["pause"]
    steps = len(engine.steps)

    # when: others come meanwhile, and the host asks
    late = scheduler.submit(Script([7]))
    assert scheduler.call(lambda: "asked") == "asked"
    assert len(engine.steps) == steps
    scheduler.release(lambda: seen.append("resume"))

    # then
    assert list(running) == [0, 1, 2]
    assert list(late) == [7]
    assert seen == ["pause", "resume"]


def test_what_fails_to_be_held_goes_on(scheduler: Scheduler) -> None:
    def refuse() -> None:
        raise InvalidArgument("NOT_PAUSABLE", "no")

    with pytest.raises(InvalidArgument):
        scheduler.hold(refuse)
    assert list(scheduler.submit(Script([1]))) == [1]


def test_closing_while_it_is_held_ends_all(engine: StepEngine) -> None:
    scheduler = Scheduler(engine, max_queue=3)
    scheduler.hold(lambda: None)
    job = scheduler.submit(Script([1]))
    scheduler.close()
    with pytest.raises(Cancelled):
        list(job)
    assert engine.dropped == []


def test_the_hosts_own_work_runs_between_two_steps(scheduler: Scheduler, engine: StepEngine) -> None:
    hold, running = occupy(scheduler, 0, 1, 2)
    seen: list[int] = []
    own = threading.Thread(target=lambda: scheduler.call(lambda: seen.append(len(engine.steps))))
    own.start()
    while not scheduler._errands:
        pass

    hold.go_on()

    assert list(running) == [0, 1, 2]
    own.join(5)
    assert seen == [1]


def test_the_hosts_own_work_fails_to_the_host_alone(scheduler: Scheduler) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret")

    with pytest.raises(InternalError):
        scheduler.call(broken)
    assert list(scheduler.submit(Script([1]))) == [1]


def test_calls_for_which_there_is_room_are_not_refused_before_they_are_admitted(
    scheduler: Scheduler,
) -> None:
    # given a computing thread that is busy, so that nobody is admitted yet
    hold = Hold()
    busy = threading.Thread(target=scheduler.call, args=[hold.wait])
    busy.start()
    assert hold.reached.wait(20)

    # when as many come as there is room for, and as may wait
    jobs = [scheduler.submit(Script([number])) for number in range(ROOM + 3)]
    with pytest.raises(ResourceExhausted):
        scheduler.submit(Script([9]))

    # then all of those are answered
    hold.go_on()
    assert [list(job) for job in jobs] == [[number] for number in range(ROOM + 3)]
    busy.join(20)


def test_a_lost_device_ends_all_jobs_and_the_process_is_given_up(engine: StepEngine, clock: Clock) -> None:
    # given one that runs and one that waits
    given_up = threading.Event()
    scheduler = Scheduler(engine, max_queue=3, clock=clock, lost=given_up.set)
    hold, running = occupy(scheduler, 0, 1)
    waiting = scheduler.submit(Script([1]))

    # when the step finds that its device is gone
    engine.broken = DeviceLost("the GPU failed: an illegal memory access was encountered")
    hold.go_on()

    # then both are told so, in a way that lets them be answered elsewhere
    for job in (running, waiting):
        with pytest.raises(Unavailable) as failure:
            list(job)
        assert (failure.value.reason, failure.value.retry_after) == ("DEVICE_LOST", 0.2)
    assert given_up.wait(5)
    scheduler.close()


def test_closing_cancels_what_waits_and_what_runs(engine: StepEngine, clock: Clock) -> None:
    scheduler = Scheduler(engine, max_queue=3, clock=clock)
    hold, running = occupy(scheduler, 0, 1, 2)
    waiting = scheduler.submit(Script([1]))
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    while not scheduler._closed:
        pass

    hold.go_on()
    closing.join(5)

    for job in (waiting, running):
        with pytest.raises(Cancelled):
            list(job)
    assert scheduler.load.sequences == 0


# What a caller receives, and when


class Batches:
    """Work that writes down what it was asked to join."""

    def __init__(self) -> None:
        self.joined: list[list[Any]] = []

    def receive(self, computed: Sequence[Any]) -> Reply:
        self.joined.append(list(computed))
        return Reply(computed)


def test_the_first_token_comes_at_once_and_later_ones_together() -> None:
    work = Batches()
    job = Job(work, None, lambda: None)
    items = iter(job)

    job.put(1)
    assert next(items) == 1
    for item in (2, 3, 4):
        job.put(item)
    assert [next(items) for _ in range(3)] == [2, 3, 4]

    assert work.joined == [[1], [2, 3, 4]]


def test_the_end_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_host.scheduler.SEND_INTERVAL", 3600)
    work = Batches()
    job = Job(work, None, lambda: None)
    items = iter(job)
    job.put(1)
    next(items)

    job.put(2)
    job.end(InvalidArgument("WRONG", "no"))

    assert next(items) == 2
    with pytest.raises(InvalidArgument):
        next(items)


def test_a_reader_who_looks_is_told_of_the_first_token_and_the_end() -> None:
    told: list[str] = []
    job = Job(Batches(), None, lambda: None, lambda: told.append("look"))

    job.put(1)
    assert told == ["look"]
    job.put(2)
    assert told == ["look"]
    assert job.take() == ([1, 2], False, None)
    job.end()

    assert told == ["look", "look"]
    assert job.take() == ([], True, None)


def test_what_comes_after_the_end_is_not_kept() -> None:
    job = Job(Batches(), None, lambda: None)
    job.end()

    job.put(1)
    job.end(InvalidArgument("WRONG", "no"))

    assert job.take() == ([], True, None)


def test_a_caller_who_has_all_it_asked_for_stops_the_computation(
    scheduler: Scheduler, engine: StepEngine
) -> None:
    class Satisfied(Script):
        def receive(self, computed: Sequence[Any]) -> Reply:
            return Reply(computed[:1], ended=True)

    hold = Hold()
    script = Satisfied([0, hold, 1, 2, 3])

    assert list(scheduler.submit(script)) == [0]
    hold.go_on()
    assert script.left.wait(5)
    assert engine.dropped == [script]


def test_readers_who_never_read_hold_up_nobody(scheduler: Scheduler, engine: StepEngine) -> None:
    unread = scheduler.submit(Script(range(500)))
    scheduler.submit(Script(range(50)))

    assert list(scheduler.submit(Script(range(100)))) == list(range(100))

    # Nothing is held for them but what their own work computed, and their room is free again.
    settle(scheduler)
    assert unread.take() == (list(range(500)), True, None)
    assert engine.load == Load()


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), DeviceLost("gone")])
def test_work_that_cannot_be_dropped_leaves_nobody_waiting_for_ever(error: Exception) -> None:
    # given: an engine that fails when work is taken from it, a job under way and one that waits
    engine, lost = StepEngine(sequences=1), threading.Event()
    made = Scheduler(engine, max_queue=3, lost=lost.set)
    hold = Hold()
    leaving = made.submit(Script([hold, 0, 1]))
    assert hold.reached.wait(5)
    waiting = made.submit(Script([2]))

    def drop(work: Work) -> None:
        raise error

    engine.drop = drop  # type: ignore[method-assign]

    # when the first is cancelled, then both are told,
    leaving.cancel()
    hold.go_on()
    for job in (leaving, waiting):
        with pytest.raises((InternalError, Unavailable)):
            list(job)

    # and the computing thread lives on
    assert made.call(lambda: "alive") == "alive"
    assert lost.is_set() == isinstance(error, DeviceLost)
    made.close()

"""A job runs its steps in order; when one fails, everything that was done is undone in reverse."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest
from structlog.testing import capture_logs

from dumont.errors import Aborted, DumontError, Internal, ResourceExhausted
from snapshotd.failpoints import Failpoints
from snapshotd.jobs.executor import Step, run_job
from snapshotd.model import Phase

NAMES = ("one", "two", "three")


class StepClock:
    """Moves one second at each look."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> object:
        raise AssertionError("a job has no use for the time of day")

    def monotonic(self) -> float:
        self.seconds += 1.0
        return self.seconds


class Recorder:
    """Steps that write down what happens to them, and an observer that does too."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.ended: list[tuple[str, str, type[BaseException] | None]] = []

    def action(self, text: str, error: BaseException | None = None) -> Callable[[], Awaitable[None]]:
        async def act() -> None:
            self.events.append(text)
            if error is not None:
                raise error

        return act

    def steps(self, failing: str = "", error: BaseException | None = None) -> list[Step]:
        return [
            Step(name, self.action(name, error if name == failing else None), self.action(f"undo {name}"))
            for name in NAMES
        ]

    def step_started(self, name: str) -> None:
        self.events.append(f"start {name}")

    def step_ended(self, job: str, phase: Phase, error: BaseException | None) -> None:
        self.ended.append((job, phase.name, type(error) if error else None))


async def run(recorder: Recorder, steps: list[Step], failpoints: Failpoints | None = None) -> list[Phase]:
    phases: list[Phase] = []
    await run_job("job", steps, StepClock(), recorder, failpoints or Failpoints(), phases)  # type: ignore[arg-type]
    return phases


async def test_steps_run_in_order_and_their_times_are_kept() -> None:
    recorder = Recorder()

    phases = await run(recorder, recorder.steps())

    assert recorder.events == ["start one", "one", "start two", "two", "start three", "three"]
    assert phases == [Phase(name, 1.0) for name in NAMES]
    assert recorder.ended == [("job", name, None) for name in NAMES]


@pytest.mark.parametrize("failing", NAMES)
async def test_a_failed_step_is_undone_with_all_before_it_in_reverse(failing: str) -> None:
    recorder = Recorder()

    with pytest.raises(Aborted) as failure:
        await run(recorder, recorder.steps(failing, Aborted("BUSY", "busy")))

    done = NAMES[: NAMES.index(failing) + 1]
    undone = [event for event in recorder.events if event.startswith("undo")]
    assert undone == [f"undo {name}" for name in reversed(done)]
    assert failure.value.metadata == {"step": f"job.{failing}"}


async def test_a_defect_is_logged_whole_and_the_caller_told_only_where_to_look() -> None:
    # given: a step with a defect, whose text says what no caller should read
    recorder = Recorder()
    defect = KeyError("secret detail")

    # when
    with capture_logs() as entries, pytest.raises(Internal) as failure:
        await run(recorder, recorder.steps("two", defect))

    # then: the caller gets the step and an id, and the log has the exception under that id
    assert failure.value.reason == "STEP_FAILED"
    assert "job.two" in failure.value.message
    assert "secret detail" not in failure.value.message
    (entry,) = [entry for entry in entries if entry["event"] == "job_defect"]
    assert entry["incident"] == failure.value.metadata["incident"]
    assert entry["incident"] in failure.value.message
    assert entry["exc_info"] is defect
    assert (entry["job"], entry["step"]) == ("job", "two")


async def test_an_undo_that_fails_does_not_keep_the_others_from_running() -> None:
    recorder = Recorder()
    steps = recorder.steps("three", Aborted("BUSY", "busy"))
    steps[1] = Step("two", recorder.action("two"), recorder.action("undo two", OSError("gone")))

    with pytest.raises(Aborted):
        await run(recorder, steps)

    assert recorder.events[-3:] == ["undo three", "undo two", "undo one"]


async def test_a_cancelled_job_unwinds_before_it_ends() -> None:
    recorder = Recorder()
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    steps = recorder.steps()
    steps[1] = Step("two", hang, recorder.action("undo two"))
    job = asyncio.create_task(run(recorder, steps))
    await reached.wait()
    job.cancel()

    with pytest.raises(asyncio.CancelledError):
        await job
    assert recorder.events[-2:] == ["undo two", "undo one"]


async def test_a_job_cancelled_again_while_it_unwinds_still_ends_with_nothing_left() -> None:
    recorder = Recorder()
    unwinding, go_on = asyncio.Event(), asyncio.Event()

    async def slow_undo() -> None:
        unwinding.set()
        await go_on.wait()
        recorder.events.append("undo two")

    steps = recorder.steps("three", Aborted("BUSY", "busy"))
    steps[1] = Step("two", recorder.action("two"), slow_undo)
    job = asyncio.create_task(run(recorder, steps))
    await unwinding.wait()
    job.cancel()
    asyncio.get_running_loop().call_soon(go_on.set)

    with pytest.raises(Aborted):
        await job
    assert recorder.events[-3:] == ["undo three", "undo two", "undo one"]


class Failing(Recorder):
    """An observer whose log is on a full disk."""

    def step_started(self, name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def step_ended(self, job: str, phase: Phase, error: BaseException | None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


async def test_an_observer_that_fails_decides_nothing() -> None:
    # A job that succeeds is done
    recorder = Failing()
    assert len(await run(recorder, recorder.steps())) == len(NAMES)

    # One that fails is undone, and told as what it failed of
    recorder = Failing()
    with pytest.raises(Aborted):
        await run(recorder, recorder.steps("two", Aborted("BUSY", "busy")))
    assert recorder.events == ["one", "two", "undo two", "undo one"]


async def test_a_full_disk_is_told_as_such() -> None:
    recorder = Recorder()

    with pytest.raises(ResourceExhausted) as failure:
        await run(recorder, recorder.steps("two", OSError(errno.ENOSPC, "No space left on device")))

    assert failure.value.reason == "DISK_FULL"
    assert failure.value.metadata == {"step": "job.two"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["", ".after"])
async def test_every_step_is_a_failpoint_before_and_after_it_ran(name: str, suffix: str) -> None:
    recorder = Recorder()

    with pytest.raises(DumontError) as failure:
        await run(recorder, recorder.steps(), Failpoints({f"job.{name}{suffix}": "error"}))

    assert failure.value.reason == "FAILPOINT"
    assert (name in recorder.events) is bool(suffix)
    assert recorder.events[-1] == "undo one"


def test_failpoints_are_read_from_one_setting() -> None:
    assert Failpoints.parse("capture.dump=error, restore.criu.after=exit").actions == {
        "capture.dump": "error",
        "restore.criu.after": "exit",
    }
    assert Failpoints.parse("").actions == {}
    with pytest.raises(ValueError, match=r"capture\.dump"):
        Failpoints.parse("capture.dump=explode")

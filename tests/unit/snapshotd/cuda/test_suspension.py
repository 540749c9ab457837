"""All CUDA processes of an instance are suspended, or none is."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dumont.errors import Aborted, DumontError
from snapshotd.cuda import suspension
from snapshotd.system.process_tree import process_tree
from tests.fakes.fake_cuda import FakeCuda

PIDS = (11, 12, 13)
FAULTS = ["refuse", "die", "hang"]


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda(PIDS)


async def test_every_process_is_locked_before_the_first_is_checkpointed(cuda: FakeCuda) -> None:
    await suspension.suspend(cuda, PIDS, lock_timeout=1)
    assert cuda.calls == [("lock", pid) for pid in PIDS] + [("checkpoint", pid) for pid in PIDS]
    assert set(cuda.states.values()) == {"checkpointed"}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("moment", ["", "after-"])
@pytest.mark.parametrize("operation", ["lock", "checkpoint"])
@pytest.mark.parametrize("pid", PIDS)
async def test_when_one_fails_all_run_again(
    cuda: FakeCuda, operation: str, moment: str, pid: int, kind: str
) -> None:
    cuda.faults[moment + operation, pid] = kind
    with pytest.raises(Aborted) as refusal:
        await suspension.suspend(cuda, PIDS, lock_timeout=1)
    assert refusal.value.metadata == {"operation": operation, "pid": str(pid)}
    assert set(cuda.states.values()) == {"running"}


async def test_what_was_done_is_undone_in_reverse(cuda: FakeCuda) -> None:
    cuda.faults["checkpoint", 13] = "refuse"
    with pytest.raises(Aborted):
        await suspension.suspend(cuda, PIDS, lock_timeout=1)
    undone = cuda.calls[cuda.calls.index(("checkpoint", 13)) + 1 :]
    assert undone == [("restore", 12), ("restore", 11), ("unlock", 13), ("unlock", 12), ("unlock", 11)]


async def test_an_undo_that_fails_leaves_the_first_failure_to_be_told_and_the_others_undone(
    cuda: FakeCuda,
) -> None:
    cuda.faults |= {("checkpoint", 13): "refuse", ("unlock", 12): "refuse"}
    with pytest.raises(Aborted, match="checkpoint of process 13"):
        await suspension.suspend(cuda, PIDS, lock_timeout=1)
    assert cuda.states == {11: "running", 12: "locked", 13: "running"}


async def test_who_is_cancelled_lets_the_operation_end_and_undoes_it(cuda: FakeCuda) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    checkpoint = cuda.checkpoint

    async def slow(pid: int) -> None:
        begun.set()
        await go_on.wait()
        await checkpoint(pid)

    cuda.checkpoint = slow  # type: ignore[method-assign]
    suspending = asyncio.create_task(suspension.suspend(cuda, PIDS[:1], lock_timeout=1))
    await begun.wait()
    suspending.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await suspending
    assert cuda.calls[1:] == [("checkpoint", 11), ("restore", 11), ("unlock", 11)]
    assert cuda.states[11] == "running"


async def test_resume_restores_all_with_the_device_map_and_then_unlocks(cuda: FakeCuda) -> None:
    await suspension.suspend(cuda, PIDS, lock_timeout=1)
    cuda.calls.clear()
    await suspension.resume(cuda, PIDS, {"old": "new"})
    assert cuda.calls == [("restore", pid) for pid in PIDS] + [("unlock", pid) for pid in PIDS]
    assert cuda.devices == [{"old": "new"}] * 3


async def test_recovery_makes_whatever_was_left_run_and_touches_nothing_that_runs(cuda: FakeCuda) -> None:
    cuda.states = {11: "running", 12: "locked", 13: "checkpointed"}
    await suspension.recover(cuda, PIDS)
    assert set(cuda.states.values()) == {"running"}
    assert cuda.calls == [("restore", 13), ("unlock", 13), ("unlock", 12)]


async def test_recovery_names_a_process_that_cannot_run_again_and_helps_the_others(
    cuda: FakeCuda,
) -> None:
    cuda.states = {11: "locked", 12: "failed", 13: "checkpointed"}
    with pytest.raises(Aborted, match="process 12 cannot run again"):
        await suspension.recover(cuda, PIDS)
    assert cuda.states == {11: "running", 12: "failed", 13: "running"}


async def test_the_cuda_processes_of_a_family_are_those_that_the_driver_knows(cuda: FakeCuda) -> None:
    assert await suspension.find(cuda, [10, 11, 12, 99]) == [11, 12]


async def test_a_process_alone_is_not_asked_for(cuda: FakeCuda) -> None:
    cuda.faults["state", 11] = "die"
    assert await suspension.find(cuda, [11]) == [11]


async def test_a_family_in_which_nobody_knows_cuda_is_its_eldest(cuda: FakeCuda) -> None:
    assert await suspension.find(cuda, [97, 98]) == [97]


async def test_an_answer_that_never_came_is_no_answer(cuda: FakeCuda) -> None:
    cuda.faults["state", 12] = "die"
    with pytest.raises(DumontError) as refusal:
        await suspension.find(cuda, PIDS)
    assert refusal.value.reason == "CUDA_AGENT_LOST"


def test_a_family_is_a_process_and_all_that_descends_from_it() -> None:
    # A child with a child, held by their pipe.
    inner = "import sys; print('up', flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        found = process_tree(parent.pid)
        assert found[0] == parent.pid
        assert len(found) == 2
        assert found == [pid for pid in process_tree(os.getpid()) if pid in found]
        parent.communicate(b"")


def test_a_family_of_nobody_is_the_pid_alone(tmp_path: Path) -> None:
    assert process_tree(7, tmp_path) == [7]

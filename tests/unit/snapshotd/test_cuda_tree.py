"""All CUDA processes of an instance are suspended, or none is."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from dumont.errors import Aborted
from snapshotd.cuda import tree

PIDS = (11, 12, 13)


class FakeCuda:
    """The driver's states and rules, and one call that fails."""

    def __init__(self, failing: tuple[str, int] | None = None) -> None:
        self.states = dict.fromkeys(PIDS, "running")
        self.calls: list[tuple[str, int]] = []
        self.devices: list[Mapping[str, str]] = []
        self.failing = failing

    async def state(self, pid: int) -> str:
        return self.states[pid]

    async def lock(self, pid: int, timeout: float) -> None:
        self._move("lock", pid, "running", "locked")

    async def checkpoint(self, pid: int) -> None:
        self._move("checkpoint", pid, "locked", "checkpointed")

    async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
        self.devices.append(devices)
        self._move("restore", pid, "checkpointed", "locked")

    async def unlock(self, pid: int) -> None:
        self._move("unlock", pid, "locked", "running")

    def _move(self, operation: str, pid: int, before: str, after: str) -> None:
        self.calls.append((operation, pid))
        if self.failing == (operation, pid):
            raise Aborted("CUDA_FAILED", f"{operation} of {pid}")
        assert self.states[pid] == before, (operation, pid, self.states[pid])
        self.states[pid] = after


async def test_every_process_is_locked_before_the_first_is_checkpointed() -> None:
    cuda = FakeCuda()
    await tree.suspend(cuda, PIDS, lock_timeout=1)
    assert cuda.calls == [("lock", pid) for pid in PIDS] + [("checkpoint", pid) for pid in PIDS]
    assert set(cuda.states.values()) == {"checkpointed"}


@pytest.mark.parametrize("operation", ["lock", "checkpoint"])
@pytest.mark.parametrize("pid", PIDS)
async def test_when_one_fails_all_run_again(operation: str, pid: int) -> None:
    cuda = FakeCuda((operation, pid))
    with pytest.raises(Aborted, match=f"{operation} of {pid}"):
        await tree.suspend(cuda, PIDS, lock_timeout=1)
    assert set(cuda.states.values()) == {"running"}


async def test_an_undo_that_fails_leaves_the_first_failure_to_be_told() -> None:
    cuda = FakeCuda(("checkpoint", 13))
    undo = cuda.unlock

    async def unlock(pid: int) -> None:
        if pid == 12:
            raise Aborted("CUDA_FAILED", "unlock of 12")
        await undo(pid)

    cuda.unlock = unlock  # type: ignore[method-assign]
    with pytest.raises(Aborted, match="checkpoint of 13"):
        await tree.suspend(cuda, PIDS, lock_timeout=1)
    assert cuda.states == {11: "running", 12: "locked", 13: "running"}


async def test_revive_restores_all_with_the_device_map_and_then_unlocks() -> None:
    cuda = FakeCuda()
    await tree.suspend(cuda, PIDS, lock_timeout=1)
    cuda.calls.clear()
    await tree.revive(cuda, PIDS, {"old": "new"})
    assert cuda.calls == [("restore", pid) for pid in PIDS] + [("unlock", pid) for pid in PIDS]
    assert cuda.devices == [{"old": "new"}] * 3


async def test_rouse_brings_back_whatever_was_left_and_touches_nothing_that_runs() -> None:
    cuda = FakeCuda()
    cuda.states = {11: "running", 12: "locked", 13: "checkpointed"}
    await tree.rouse(cuda, PIDS)
    assert set(cuda.states.values()) == {"running"}
    assert cuda.calls == [("restore", 13), ("unlock", 12), ("unlock", 13)]


def test_the_device_map_lists_every_gpu_or_nothing() -> None:
    assert tree.device_map(["a", "b"], ["a", "b"]) == {}
    assert tree.device_map(["a", "b"], ["c", "b"]) == {"a": "c", "b": "b"}
    with pytest.raises(ValueError, match="zip"):
        tree.device_map(["a"], ["b", "c"])

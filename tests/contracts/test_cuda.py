"""The Cuda port: one promise, kept by the fake, by the agent and by the command line tool."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from dumont.errors import Aborted, DumontError, Internal, ResourceExhausted
from snapshotd.adapters.cuda import backend as cuda_backend
from snapshotd.adapters.cuda.agent import CudaAgent
from snapshotd.adapters.cuda.cli import CudaCheckpoint
from snapshotd.config import Settings
from snapshotd.ports import Cuda
from tests.conftest import require
from tests.contracts import cuda_files
from tests.fakes.fake_cuda import FakeCuda
from tests.helpers.cuda_process import CudaProcess

OPERATIONS = ["lock", "checkpoint", "restore", "unlock"]
GPUS = [f"GPU-{digit * 8}-{digit * 4}-{digit * 4}-{digit * 4}-{digit * 12}" for digit in "ab"]
AGENT = (
    "from tests.contracts.cuda_files import Process; from snapshotd.cuda.agent import serve; serve(Process)"
)
# What an operation that never ends is given; every other one takes milliseconds.
HANG_SECONDS = 2.0


class Bench:
    """One adapter over a driver in files, and what the driver saw."""

    pid = 5

    def __init__(self, cuda: Cuda, directory: Path) -> None:
        self.cuda = cuda
        self.directory = directory
        for pid in (5, 6):
            (directory / str(pid)).write_text("running")

    def fault(self, operation: str, kind: str) -> None:
        (self.directory / "faults").write_text(f"{operation} {self.pid} {kind}\n")

    def timeout_ms(self) -> int:
        return int((self.directory / f"{self.pid}.timeout_ms").read_text())

    def devices(self) -> dict[str, str]:
        pairs = (self.directory / f"{self.pid}.devices").read_text().split(",")
        return dict(pair.split("=") for pair in pairs if pair)


class FakeBench(Bench):
    """The fake keeps its own states."""

    cuda: FakeCuda

    def fault(self, operation: str, kind: str) -> None:
        self.cuda.faults[operation, self.pid] = kind

    def timeout_ms(self) -> int:
        return round(self.cuda.timeouts[-1] * 1000)

    def devices(self) -> dict[str, str]:
        return {old[4:]: new[4:] for old, new in self.cuda.devices[-1].items()}


@pytest_asyncio.fixture(params=["fake", "agent", "cli"])
async def bench(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    monkeypatch.setenv(cuda_files.DIRECTORY, str(tmp_path))
    if request.param == "fake":
        yield FakeBench(FakeCuda((5, 6)), tmp_path)
        return
    adapter: CudaAgent | CudaCheckpoint
    if request.param == "agent":
        adapter = CudaAgent([sys.executable, "-c", AGENT], HANG_SECONDS)
    else:
        adapter = CudaCheckpoint(stand_in(tmp_path), HANG_SECONDS)
    yield Bench(adapter, tmp_path)
    await adapter.close()


def stand_in(directory: Path) -> Path:
    """A program that speaks as ``cuda-checkpoint`` does."""
    path = directory / "cuda-checkpoint"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.contracts.cuda_files "$@"\n')
    path.chmod(0o755)
    return path


@contextmanager
def refused(reason: str) -> Iterator[list[DumontError]]:
    told: list[DumontError] = []
    with pytest.raises(DumontError) as refusal:
        yield told
    told.append(refusal.value)
    assert refusal.value.reason == reason


async def perform(bench: Bench, operation: str) -> None:
    call: dict[str, Callable[[], object]] = {
        "lock": lambda: bench.cuda.lock(bench.pid, 1.5),
        "checkpoint": lambda: bench.cuda.checkpoint(bench.pid),
        "restore": lambda: bench.cuda.restore(bench.pid, {}),
        "unlock": lambda: bench.cuda.unlock(bench.pid),
    }
    await call[operation]()  # type: ignore[misc]


async def before(bench: Bench, operation: str) -> None:
    """Bring the process to where ``operation`` is due."""
    for earlier in OPERATIONS[: OPERATIONS.index(operation)]:
        await perform(bench, earlier)


async def test_a_process_goes_through_its_states_in_their_order(bench: Bench) -> None:
    seen = [await bench.cuda.state(bench.pid)]
    for operation in OPERATIONS:
        await perform(bench, operation)
        seen.append(await bench.cuda.state(bench.pid))
    assert seen == ["running", "locked", "checkpointed", "locked", "running"]
    assert bench.timeout_ms() == 1500
    assert bench.devices() == {}


async def test_a_device_map_reaches_the_driver_whole(bench: Bench) -> None:
    await before(bench, "restore")
    await bench.cuda.restore(bench.pid, {GPUS[0]: GPUS[1], GPUS[1]: GPUS[0]})
    bare = [gpu.removeprefix("GPU-") for gpu in GPUS]
    assert bench.devices() == {bare[0]: bare[1], bare[1]: bare[0]}


async def test_a_process_without_cuda_is_told_apart(bench: Bench) -> None:
    with refused("CUDA_FAILED") as told:
        await bench.cuda.state(4)
    assert told[0].metadata == {"operation": "state", "pid": "4"}


@pytest.mark.parametrize("operation", ["checkpoint", "restore", "unlock"])
async def test_what_is_not_due_is_refused_and_changes_nothing(bench: Bench, operation: str) -> None:
    with refused("CUDA_FAILED") as told:
        await perform(bench, operation)
    assert told[0].metadata == {"operation": operation, "pid": str(bench.pid)}
    assert "invalid argument" in told[0].message
    assert await bench.cuda.state(bench.pid) == "running"


async def test_work_that_does_not_end_fails_the_lock_and_may_be_tried_again(bench: Bench) -> None:
    bench.fault("lock", "busy")
    with refused("CUDA_LOCK_TIMEOUT") as told:
        await perform(bench, "lock")
    assert isinstance(told[0], Aborted)
    assert told[0].retry_after
    await perform(bench, "lock")
    assert await bench.cuda.state(bench.pid) == "locked"


async def test_a_full_gpu_is_told_as_such(bench: Bench) -> None:
    await before(bench, "restore")
    bench.fault("restore", "full")
    with refused("GPU_MEMORY") as told:
        await perform(bench, "restore")
    assert isinstance(told[0], ResourceExhausted)
    assert await bench.cuda.state(bench.pid) == "checkpointed"


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_refusal_leaves_the_process_where_it_was(bench: Bench, operation: str) -> None:
    await before(bench, operation)
    state = await bench.cuda.state(bench.pid)
    bench.fault(operation, "refuse")
    with refused("CUDA_FAILED"):
        await perform(bench, operation)
    assert await bench.cuda.state(bench.pid) == state


@pytest.mark.parametrize("moment", ["", "after-"])
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_who_dies_in_the_middle_is_noticed_and_the_process_tells_how_far_it_came(
    bench: Bench, operation: str, moment: str
) -> None:
    await before(bench, operation)
    state = await bench.cuda.state(bench.pid)
    bench.fault(moment + operation, "die")
    with refused("CUDA_AGENT_LOST") as told:
        await perform(bench, operation)
    assert told[0].metadata == {"operation": operation, "pid": str(bench.pid)}
    expected = cuda_files.MOVES[operation][1] if moment else state
    assert await bench.cuda.state(bench.pid) == expected


async def test_an_operation_that_never_ends_is_given_up_and_the_next_one_works(bench: Bench) -> None:
    await before(bench, "checkpoint")
    bench.fault("checkpoint", "hang")
    with refused("CUDA_TIMEOUT"):
        await perform(bench, "checkpoint")
    assert await bench.cuda.state(bench.pid) == "locked"
    await perform(bench, "checkpoint")


async def test_processes_are_driven_beside_each_other(bench: Bench) -> None:
    await asyncio.gather(bench.cuda.lock(5, 1), bench.cuda.lock(6, 1))
    assert [await bench.cuda.state(pid) for pid in (5, 6)] == ["locked", "locked"]


# What only one of them promises.


async def test_an_operation_that_never_ends_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cuda_files.DIRECTORY, str(tmp_path))
    agent = CudaAgent([sys.executable, "-c", AGENT], HANG_SECONDS)
    Bench(agent, tmp_path)
    (tmp_path / "faults").write_text("lock 5 hang\nlock 6 hang\n")
    # The driver's own timeout comes on top of the limit: this one still waits when the other is given up.
    waiting = asyncio.create_task(agent.lock(5, 60))
    with refused("CUDA_TIMEOUT"):
        await agent.lock(6, 0)

    assert await agent.state(6) == "running"
    assert not waiting.done()
    await agent.close()
    with refused("CUDA_AGENT_LOST"):
        await waiting


async def test_what_libraries_print_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given: one that prints when it is loaded, and again in each operation
    monkeypatch.setenv(cuda_files.DIRECTORY, str(tmp_path))
    printing = (
        "import os; from tests.contracts.cuda_files import Process; from snapshotd.cuda.agent import serve\n"
        "os.write(1, b'a banner\\n' + b'x' * 100_000 + b'\\n')\n"
        "def process(pid): os.write(1, b'a warning\\n'); print('another', flush=True); return Process(pid)\n"
        "serve(process)"
    )
    agent = CudaAgent([sys.executable, "-c", printing], HANG_SECONDS)
    Bench(agent, tmp_path)
    assert await agent.state(5) == "running"
    assert await agent.state(6) == "running"
    await agent.close()


async def test_an_agent_that_says_what_is_no_answer_is_heard_on() -> None:
    talking = (
        "import json, sys; print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        " answer = {'id': json.loads(line)['id'], 'ok': 'running'}\n"
        " print('noise', '[]', '{}', json.dumps(answer), sep='\\n', flush=True)"
    )
    agent = CudaAgent([sys.executable, "-c", talking], HANG_SECONDS)
    assert [await agent.state(5), await agent.state(5)] == ["running", "running"]
    await agent.close()


async def test_an_agent_that_cannot_start_is_told() -> None:
    client = CudaAgent([sys.executable, "-c", "raise SystemExit('no driver')"])
    with pytest.raises(Internal) as refusal:
        await client.state(1)
    assert refusal.value.reason == "CUDA_AGENT_FAILED"
    await client.close()


async def test_a_program_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(Internal) as refusal:
        await CudaCheckpoint(tmp_path / "absent").state(1)
    assert refusal.value.reason == "CUDA_AGENT_FAILED"
    assert "--cuda-checkpoint" in refusal.value.message


# On a real GPU, the same life.


@pytest.fixture(params=["driver", "cli"])
def real(request: pytest.FixtureRequest) -> CudaAgent | CudaCheckpoint:
    try:
        return cuda_backend.choose(request.param, Settings().cuda_checkpoint)
    except DumontError as error:
        require(False, error.message)
        raise


@pytest.mark.gpu
async def test_a_real_process_goes_through_its_states_and_computes_on(
    real: CudaAgent | CudaCheckpoint,
) -> None:
    with CudaProcess() as process:
        before = process.ask("sum")
        seen = [await real.state(process.pid)]
        for operation in (
            real.lock(process.pid, 5),
            real.checkpoint(process.pid),
            real.restore(process.pid, {}),
            real.unlock(process.pid),
        ):
            await operation
            seen.append(await real.state(process.pid))
        assert seen == ["running", "locked", "checkpointed", "locked", "running"]
        assert process.ask("sum") == before
    await real.close()


@pytest.mark.gpu
async def test_a_real_process_that_computes_on_and_on_cannot_be_locked_in_time(
    real: CudaAgent | CudaCheckpoint,
) -> None:
    with CudaProcess() as process:
        assert process.ask("spin 20") == "spinning"
        with refused("CUDA_LOCK_TIMEOUT"):
            await real.lock(process.pid, 0.5)
        # What a timed-out lock leaves is the driver's to say; nothing may keep it from being undone.
        if await real.state(process.pid) == "locked":
            await real.unlock(process.pid)
        assert await real.state(process.pid) == "running"
    await real.close()


@pytest.mark.gpu
async def test_a_real_process_without_cuda_is_told_apart(real: CudaAgent | CudaCheckpoint) -> None:
    with CudaProcess(cuda=False) as process, refused("CUDA_FAILED") as told:
        await real.state(process.pid)
    assert told[0].metadata == {"operation": "state", "pid": str(process.pid)}
    await real.close()

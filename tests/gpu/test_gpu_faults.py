"""Faults on a GPU: the source serves or is cleanly dead, and the GPU's memory is back to where it was."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dumont.errors import DumontError
from snapshotd.cuda import suspension
from snapshotd.model import Json, Snapshot, State
from snapshotd.system.process_tree import process_tree
from tests.gpu.gpu_node import (
    MIB,
    SLACK,
    UNSEEN,
    GpuNode,
    Meddler,
    comes_back_to,
    kill_performer,
    until,
    used,
)
from tests.helpers.cuda_process import CudaProcess
from tests.node.node_under_test import refused

pytestmark = [pytest.mark.gpu, pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]

# Seconds into an operation that takes from under a millisecond to a few tenths of a second.
MOMENTS = [0.0, 0.1]
STEPS = [
    ("park", "lock"),
    ("park", "checkpoint"),
    ("resume", "restore"),
    ("resume", "unlock"),
    ("capture", "lock"),
    ("capture", "checkpoint"),
    ("capture", "restore"),
    ("capture", "unlock"),
    ("restore", "restore"),
    ("restore", "unlock"),
]


@contextmanager
def meddling(node: GpuNode, operation: str, after: float, strike: Callable[[], None]) -> Iterator[Meddler]:
    """Have somebody strike in the middle of the node's next such operation."""
    meddler = Meddler(node, operation, after, strike)
    whole = node.instances.node
    assert whole.gpus is not None
    node.instances.node = replace(whole, gpus=replace(whole.gpus, cuda=meddler))
    try:
        yield meddler
    finally:
        node.instances.node = whole


async def perform(node: GpuNode, job: str, snapshot: Snapshot) -> None:
    if job == "capture":
        await node.instances.capture("victim", "half")
    elif job == "restore":
        await node.restore("victim", snapshot)
    else:
        await getattr(node.instances, job)("victim")


async def prepare(node: GpuNode, job: str, snapshot: Snapshot) -> None:
    """An instance to which ``job`` can be done."""
    if job != "restore":
        await node.restore("victim", snapshot)
    if job == "resume":
        await node.instances.park("victim")


@pytest.mark.parametrize("after", MOMENTS)
@pytest.mark.parametrize(("job", "operation"), STEPS)
async def test_whoever_drives_the_gpu_is_killed_in_the_middle_of_a_step(
    node: GpuNode, snapshot: Snapshot, memory: list[int], job: str, operation: str, after: float
) -> None:
    await prepare(node, job, snapshot)
    with meddling(node, operation, after, lambda: kill_performer(node)) as meddler:
        outcome: BaseException | None = None
        try:
            await perform(node, job, snapshot)
        except DumontError as error:
            outcome = error
    assert meddler.struck

    if outcome is None and job == "park":
        await node.instances.resume("victim")
    state = await node.serves_or_is_cleanly_dead("victim")
    if outcome is None:
        # The blow fell when the operation was over: nobody noticed, and the next one works.
        assert state is State.SERVING
    if job == "capture" and "half" in [held.manifest.id for held in await node.store.list()]:
        assert outcome is None
        await node.store.delete("half")
    if state is State.FAILED:
        await comes_back_to(memory)
        # The node itself is as good as before.
        await node.restore("next", snapshot)
        assert await node.answers("next")


@pytest.mark.parametrize("operation", ["lock", "checkpoint", "restore", "unlock"])
async def test_the_source_is_killed_in_the_middle_of_a_capture(
    node: GpuNode, snapshot: Snapshot, memory: list[int], operation: str
) -> None:
    instance = await node.restore("victim", snapshot)
    with meddling(node, operation, 0.02, lambda: os.kill(instance.pid, signal.SIGKILL)):
        await refused(node.instances.capture("victim", "half"))
    assert "half" not in [held.manifest.id for held in await node.store.list()]
    await _is_cleanly_dead(node, memory)


async def test_the_source_is_killed_while_it_is_dumped(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    instance = await node.restore("victim", snapshot)
    host = node.instances._record("victim").host
    assert host is not None
    dump = host.dump

    async def struck(images: Path, timeout: float) -> Json:
        dumping = asyncio.create_task(dump(images, timeout))
        await until(lambda: dumping.done() or any(images.glob("pages-*.img")))
        os.kill(instance.pid, signal.SIGKILL)
        return await dumping

    host.dump = struck  # type: ignore[method-assign]
    await refused(node.instances.capture("victim", "half"))
    await _is_cleanly_dead(node, memory)


async def _is_cleanly_dead(node: GpuNode, memory: list[int]) -> None:
    assert await node.serves_or_is_cleanly_dead("victim") is State.FAILED
    await comes_back_to(memory)
    assert (await node.remains())["staged"] == []
    assert "half" not in [held.manifest.id for held in await node.store.list()]


def hog(leave: int) -> CudaProcess:
    """A process that leaves ``leave`` bytes of the first GPU."""
    process = CudaProcess(mib=1)
    assert process.ask(f"fill {leave // MIB}") == "full"
    return process


async def test_a_gpu_too_full_to_restore_is_refused_and_nothing_is_left(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    assert snapshot.manifest.gpu_bytes, UNSEEN
    with hog(leave=snapshot.manifest.gpu_bytes // 2):
        full = used()
        error = await refused(node.restore("homeless", snapshot, gpu="0"))
        assert (error.reason, error.code) == ("GPU_MEMORY", "RESOURCE_EXHAUSTED")
        assert await node.serves_or_is_cleanly_dead("homeless") is State.FAILED
        await comes_back_to(full)
    await comes_back_to(memory)
    await node.restore("later", snapshot, gpu="0")
    assert await node.answers("later")


async def test_a_gpu_too_full_to_resume_leaves_the_instance_parked_until_there_is_room(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("patient", snapshot, gpu="0")
    parked = await node.instances.park("patient")
    assert parked.gpu_bytes, UNSEEN
    with hog(leave=parked.gpu_bytes // 2):
        error = await refused(node.instances.resume("patient"))
        assert (error.reason, error.code) == ("GPU_MEMORY", "RESOURCE_EXHAUSTED")
        assert node.instances.get("patient").state is State.PARKED
    await comes_back_to(memory)
    await node.instances.resume("patient")
    assert await node.answers("patient")


@pytest.mark.parametrize("job", ["resume", "restore", "capture"])
async def test_a_gpu_that_fills_after_it_was_looked_at_leaves_it_serving_or_cleanly_dead(
    node: GpuNode, snapshot: Snapshot, memory: list[int], job: str
) -> None:
    # given: room when it is checked, and none when the driver restores
    await prepare(node, job, snapshot)
    hogs = ExitStack()

    class Filling(Meddler):
        async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
            if not self.struck:
                self.struck = True
                hogs.enter_context(await asyncio.to_thread(hog, 32 * MIB))
            await super().restore(pid, devices)

    whole = node.instances.node
    assert whole.gpus is not None
    filling = Filling(node, "", 0, lambda: None)
    node.instances.node = replace(whole, gpus=replace(whole.gpus, cuda=filling))
    with hogs:
        try:
            error = await refused(perform(node, job, snapshot))
        finally:
            node.instances.node = whole
    assert error.reason in ("GPU_MEMORY", "CUDA_FAILED")
    await node.serves_or_is_cleanly_dead("victim")


async def test_a_wrong_device_map_is_refused_clearly_and_the_instance_can_be_resumed(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    instance = await node.restore("lost", snapshot)
    await node.instances.park("lost")
    assert node.cuda is not None
    nowhere = "GPU-00000000-0000-0000-0000-000000000000"
    wrong = {gpu: nowhere if gpu == instance.gpu else gpu for gpu in node.uuids}
    error = await refused(node.cuda.restore(instance.pid, wrong))
    assert error.reason == "CUDA_FAILED"
    assert error.metadata["operation"] == "restore"

    if await node.cuda.state(instance.pid) == "checkpointed":
        await node.instances.resume("lost")
        assert await node.answers("lost")
    else:
        await refused(node.instances.resume("lost"))
        assert await node.serves_or_is_cleanly_dead("lost") is State.FAILED


async def test_a_gpu_that_is_not_here_is_refused_before_anything_is_touched(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("here", snapshot)
    await node.instances.park("here")
    assert (await refused(node.instances.resume("here", gpu="99"))).reason == "GPU_UNKNOWN"
    assert node.instances.get("here").state is State.PARKED
    await node.instances.resume("here")
    assert await node.answers("here")


async def test_a_loader_that_dies_makes_a_resume_slower_and_nothing_else(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("unloaded", snapshot)
    await node.instances.park("unloaded")
    assert node.loader is not None
    assert node.loader._process is not None
    node.loader._process.process.kill()
    try:
        await node.instances.resume("unloaded")
        assert await node.answers("unloaded")
    finally:
        await node.open_loader()


async def test_a_process_that_computes_on_and_on_is_not_suspended_and_computes_on(
    node: GpuNode, memory: list[int]
) -> None:
    assert node.cuda is not None
    with CudaProcess() as busy, CudaProcess() as quiet:
        before = quiet.ask("sum")
        assert busy.ask("spin 5") == "spinning"
        error = await refused(suspension.suspend(node.cuda, [quiet.pid, busy.pid], lock_timeout=0.5))
        assert error.reason == "CUDA_LOCK_TIMEOUT"
        # Both, also the one that was locked before it.
        assert [await node.cuda.state(pid) for pid in (quiet.pid, busy.pid)] == ["running", "running"]
        assert quiet.ask("sum") == before
        assert busy.ask("sum") == before


async def test_all_cuda_processes_of_a_tree_give_their_memory_up_and_take_it_again(
    node: GpuNode, memory: list[int]
) -> None:
    assert node.cuda is not None
    with CudaProcess(mib=256) as parent:
        child = int(parent.ask("fork"))
        before = parent.ask("sum")
        assert sum(used()) > sum(memory) + 2 * 256 * MIB - SLACK
        pids = await suspension.find(node.cuda, process_tree(parent.pid))
        assert pids == [parent.pid, child]

        await suspension.suspend(node.cuda, pids, lock_timeout=5)
        await comes_back_to(memory)
        await suspension.resume(node.cuda, pids, {})
        assert parent.ask("sum") == before
        assert parent.ask("child sum") == before

"""Two GPUs of one model in one node: restores on either, replicas across, live moves, one process on both."""

from __future__ import annotations

import asyncio

import pytest

from snapshotd.cuda import suspension
from snapshotd.gpu import placement
from snapshotd.instances.move import move
from snapshotd.model import Snapshot, State
from tests.gpu.gpu_node import MIB, SLACK, UNSEEN, GpuNode, comes_back_to, used
from tests.helpers.cuda_process import CudaProcess
from tests.node.crowd import all_at_once, ask, check_same, requests
from tests.node.node_under_test import refused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpus2,
    pytest.mark.node,
    pytest.mark.asyncio(loop_scope="module"),
]


def grown(memory: list[int]) -> list[int]:
    """Indices of the GPUs that hold more than they did."""
    return [index for index, now in enumerate(used()) if now > memory[index] + SLACK]


async def test_a_snapshot_of_one_gpu_is_restored_on_the_other(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    assert snapshot.manifest.gpu == node.uuids[0]
    instance = await node.restore("elsewhere", snapshot, gpu="1")
    assert (instance.gpu, instance.device) == (node.uuids[1], "cuda:0")
    assert grown(memory) == [1]
    assert await node.answers("elsewhere")


async def test_what_came_back_on_the_other_gpu_is_captured_there_and_restored_on_either(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("emigrant", snapshot, gpu="1")
    captured = await node.instances.capture("emigrant", "abroad")
    assert captured.manifest.gpu == node.uuids[1]
    assert await node.answers("emigrant")
    await node.instances.stop("emigrant")
    await comes_back_to(memory)
    for index in (0, 1):
        await node.restore(f"child-{index}", captured, gpu=str(index))
        assert grown(memory) == [index]
        assert await node.answers(f"child-{index}")
        await node.instances.stop(f"child-{index}")
        await comes_back_to(memory)


async def test_replicas_spread_over_the_gpus_by_themselves(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    names = [f"replica-{number}" for number in range(4)]
    replicas = await asyncio.gather(*(node.restore(name, snapshot) for name in names))
    on = [replica.gpu for replica in replicas]
    assert [on.count(gpu) for gpu in node.uuids[:2]] == [2, 2]
    assert await asyncio.gather(*map(node.generate, names)) == [node.answer] * 4


async def test_a_live_instance_moves_to_the_other_gpu_and_back(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    instance = await node.restore("nomad", snapshot, gpu="0")
    for index in (1, 0, 1):
        moved = await move(node.instances, "nomad", str(index))
        assert (moved.state, moved.pid, moved.gpu) == (State.SERVING, instance.pid, node.uuids[index])
        assert grown(memory) == [index]
        assert await node.answers("nomad")


async def test_a_move_in_the_middle_of_a_crowd_changes_no_answer(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("crowded", snapshot, gpu="0")
    asked = requests()
    alone = [await ask(node, "crowded", logprobs=20, **fields) for fields in asked]
    for index in (1, 0, 1):
        busy = asyncio.ensure_future(all_at_once(node, "crowded", asked))
        await asyncio.sleep(0.1)
        moved = await move(node.instances, "crowded", str(index))
        assert (moved.state, moved.gpu) == (State.SERVING, node.uuids[index])
        check_same(alone, await busy)


async def test_a_parked_instance_resumes_on_the_other_gpu(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.start("sleeper", gpu="1")
    await node.instances.park("sleeper")
    await comes_back_to(memory)
    resumed = await node.instances.resume("sleeper", gpu="0")
    assert resumed.gpu == node.uuids[0]
    assert grown(memory) == [0]
    assert await node.answers("sleeper")


async def test_a_move_to_a_full_gpu_is_refused_and_the_instance_serves_where_it_is(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    instance = await node.restore("settled", snapshot, gpu="0")
    assert node.node.gpus is not None
    assert node.node.gpus.status.used_by([instance.pid]), UNSEEN
    with pytest.MonkeyPatch.context() as patch:
        # As if another process had taken it: two GPUs are too much to fill in a test.
        patch.setattr(type(node.node.gpus.status), "free", lambda self, gpu: 64 * MIB)
        error = await refused(move(node.instances, "settled", "1"))
    assert error.reason == "GPU_MEMORY"
    assert node.instances.get("settled").state is State.SERVING
    assert grown(memory) == [0]
    assert await node.answers("settled")


async def test_one_process_on_two_gpus_is_suspended_and_comes_back_with_them_swapped(
    node: GpuNode, memory: list[int]
) -> None:
    assert node.cuda is not None
    with CudaProcess(devices=2, mib=256) as both:
        before = both.ask("sum")
        assert len(set(before.split())) == 2
        assert set(grown(memory)) >= {0, 1}
        for target in (node.uuids[0], node.uuids[1]):
            await suspension.suspend(node.cuda, [both.pid], lock_timeout=5)
            await comes_back_to(memory)
            devices = placement.device_map(node.uuids, node.uuids, node.uuids[0], target)
            await suspension.resume(node.cuda, [both.pid], devices)
            assert both.ask("sum") == before

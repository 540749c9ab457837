"""Park, capture and restore of a model on a GPU: the same tokens every time, and the memory given back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from snapshotd.model import Snapshot, State
from tests.gpu.gpu_node import SLACK, GpuNode, comes_back_to, used
from tests.node.node_under_test import refused

pytestmark = [pytest.mark.gpu, pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]


async def test_a_parked_instance_holds_no_gpu_memory_and_resumes_with_the_same_tokens(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    instance = await node.restore("sleeper", snapshot)
    assert sum(used()) > sum(memory) + SLACK
    for _ in range(3):
        await node.instances.park("sleeper")
        assert node.instances.get("sleeper").state is State.PARKED
        await comes_back_to(memory)

        await node.instances.resume("sleeper")
        assert node.instances.get("sleeper").pid == instance.pid
        assert await node.answers("sleeper")


async def test_a_cold_start_parks_and_resumes(node: GpuNode, memory: list[int]) -> None:
    await node.start("cold", gpu="0")
    assert await node.answers("cold")
    parked = await node.instances.park("cold")
    assert parked.gpu == node.uuids[0]
    await comes_back_to(memory)
    await node.instances.resume("cold")
    assert await node.answers("cold")


async def test_captured_three_times_in_a_row_and_restored_from_each(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("again", snapshot)
    captured = [await node.instances.capture("again", f"again-{number}") for number in range(3)]
    assert await node.answers("again")
    await node.instances.stop("again")
    for number, made in enumerate(captured):
        await node.restore(f"back-{number}", made)
        assert await node.answers(f"back-{number}")
        await node.instances.stop(f"back-{number}")


async def test_a_snapshot_restored_three_times_in_a_row(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    for number in range(3):
        await node.restore(f"row-{number}", snapshot)
        assert await node.answers(f"row-{number}")
        await node.instances.stop(f"row-{number}")
        await comes_back_to(memory)


async def test_a_restored_instance_is_captured_and_restored_three_generations_long(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    current = snapshot
    for generation in range(3):
        name = f"generation-{generation}"
        await node.restore(name, current)
        current = await node.instances.capture(name, name)
        assert await node.answers(name)
        await node.instances.stop(name)
    await node.restore("great-grandchild", current)
    assert await node.answers("great-grandchild")


async def test_a_restored_instance_is_parked_resumed_and_captured_no_more_once_it_served(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("everything", snapshot)
    await node.instances.park("everything")
    await node.instances.resume("everything")
    made = await node.instances.capture("everything", "after-a-park")
    assert await node.answers("everything")
    assert (await refused(node.instances.capture("everything", "served"))).reason == "INSTANCE_SERVED"
    await node.instances.stop("everything")
    await node.restore("its-child", made)
    assert await node.answers("its-child")


async def test_three_replicas_answer_on_one_gpu_at_once_and_draw_differently(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    names = ["a", "b", "c"]
    await asyncio.gather(*(node.restore(name, snapshot, gpu="0") for name in names))
    answers = await asyncio.gather(*map(node.generate, names))
    assert answers == [node.answer] * 3
    one, other, third = await asyncio.gather(*map(node.draws, names))
    assert [name for name in one if len({str(each[name]) for each in (one, other, third)}) < 3] == []


async def test_a_wrong_canary_ends_the_instance_and_quarantines_the_snapshot(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    # given: a source that recorded another answer than its image gives
    instance = await node.restore("liar", snapshot)
    assert instance.canary is not None
    wrong = replace(instance.canary, tokens=tuple(token ^ 1 for token in instance.canary.tokens))
    node.instances._record("liar").instance = replace(instance, canary=wrong)
    captured = await node.instances.capture("liar", "lie")
    await node.instances.stop("liar")
    await comes_back_to(memory)

    error = await refused(node.restore("believer", captured))

    assert error.reason == "CANARY_MISMATCH"
    assert (await node.store.get("lie")).quarantine_reason
    assert node.instances.get("believer").state is State.FAILED
    await comes_back_to(memory)

"""A capture, park, suspension, restore or resume on a GPU that fails at any of its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from snapshotd.jobs import Capture
from snapshotd.model import Snapshot, State
from tests.gpu.gpu_node import SLACK, GpuNode, comes_back_to, until, used
from tests.node.node_under_test import refused

pytestmark = [pytest.mark.gpu, pytest.mark.node, pytest.mark.asyncio(loop_scope="module")]

CAPTURE_STEPS = [
    "stage", "prepare", "drain", "quiesce", "cuda_checkpoint", "trim", "dump", "cuda_restore", "wake",
    "compact", "verify", "commit",
]  # fmt: skip
RESTORE_STEPS = [
    "check", "verify", "weights", "directory", "criu", "cuda_restore", "wake", "canary", "serve",
]  # fmt: skip
PARK_STEPS = ["drain", "quiesce", "cuda_checkpoint", "trim"]
SUSPEND_STEPS = ["pause", "cuda_checkpoint"]
RESUME_STEPS = ["cuda_restore", "wake", "serve"]
CONTINUE_STEPS = ["cuda_restore", "continue"]


@pytest.fixture(scope="module")
def backend() -> str:
    """One is enough: how the driver is reached makes no difference to the steps."""
    return "auto"


async def test_the_steps_tested_are_all_there_are(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    instance = await node.restore("steps", snapshot)
    assert [phase.name for phase in instance.phases] == RESTORE_STEPS
    record = node.instances._record("steps")
    assert [step.name for step in Capture(node.node, record, "x").steps()] == CAPTURE_STEPS
    await node.instances.park("steps")
    resumed = await node.instances.resume("steps")
    assert [phase.name for phase in resumed.phases] == RESUME_STEPS
    suspended = await node.instances.suspend("steps")
    assert (suspended.state, suspended.paused) == (State.PARKED, True)
    resumed = await node.instances.resume("steps")
    assert [phase.name for phase in resumed.phases] == CONTINUE_STEPS
    assert not resumed.paused


async def test_an_answer_goes_on_after_its_gpu_was_taken_away_and_given_back(
    node: GpuNode, snapshot: Snapshot, memory: list[int]
) -> None:
    await node.restore("interrupted", snapshot)
    for _ in range(3):
        answering = [asyncio.create_task(node.generate("interrupted")) for _ in range(4)]
        await asyncio.sleep(0.005)
        await node.instances.suspend("interrupted")
        await node.instances.resume("interrupted")
        assert await asyncio.gather(*answering) == [node.answer] * 4


@pytest.mark.parametrize("moment", ["", ".after"], ids=["before", "after"])
@pytest.mark.parametrize(
    ("job", "step"),
    [("capture", step) for step in CAPTURE_STEPS]
    + [("park", step) for step in PARK_STEPS]
    + [("suspend", step) for step in SUSPEND_STEPS],
)
async def test_a_capture_or_park_that_fails_at_any_step_leaves_the_source_answering(
    node: GpuNode, snapshot: Snapshot, memory: list[int], job: str, step: str, moment: str
) -> None:
    instance = await node.restore("source-of-failure", snapshot)
    node.failpoints.actions[f"{job}.{step}{moment}"] = "error"
    works: dict[str, Callable[[str], Awaitable[Any]]] = {
        "capture": lambda name: node.instances.capture(name, "failed"),
        "park": node.instances.park,
        "suspend": node.instances.suspend,
    }
    try:
        error = await refused(works[job]("source-of-failure"))
    finally:
        node.failpoints.actions.clear()

    assert error.reason == "FAILPOINT"
    known = node.instances.get("source-of-failure")
    assert (known.state, known.pid) == (State.SERVING, instance.pid)
    assert await node.answers("source-of-failure")
    assert "failed" not in [held.manifest.id for held in await node.store.list()]


@pytest.mark.parametrize("moment", ["", ".after"], ids=["before", "after"])
@pytest.mark.parametrize("step", RESTORE_STEPS)
async def test_a_restore_that_fails_at_any_step_leaves_nothing(
    node: GpuNode, snapshot: Snapshot, memory: list[int], step: str, moment: str
) -> None:
    node.failpoints.actions[f"restore.{step}{moment}"] = "error"
    try:
        error = await refused(node.restore("doomed", snapshot))
    finally:
        node.failpoints.actions.clear()
    assert error.metadata["step"] == f"restore.{step}"
    assert node.instances.get("doomed").state is State.FAILED
    await comes_back_to(memory)


@pytest.mark.parametrize("moment", ["", ".after"], ids=["before", "after"])
@pytest.mark.parametrize("step", RESUME_STEPS)
async def test_a_resume_that_fails_at_any_step_leaves_nothing(
    node: GpuNode, snapshot: Snapshot, memory: list[int], step: str, moment: str
) -> None:
    await node.restore("doomed", snapshot)
    await node.instances.park("doomed")
    node.failpoints.actions[f"resume.{step}{moment}"] = "error"
    try:
        await refused(node.instances.resume("doomed"))
    finally:
        node.failpoints.actions.clear()
    assert await node.serves_or_is_cleanly_dead("doomed") is State.FAILED
    await until(lambda: sum(used()) <= sum(memory) + SLACK)

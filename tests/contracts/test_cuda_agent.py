"""The client of the CUDA agent: answers, refusals, and an agent that dies."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from dumont.errors import Aborted, Internal
from snapshotd.adapters.cuda_agent import CudaAgent

# Speaks as the real agent does, over a process that is only a name; pid 13 kills the agent.
STAND_IN = """
import json, os, sys
from snapshotd.cuda.agent import commands
states = {}
class Process:
    def __init__(self, pid): self.pid = pid
    @property
    def state(self): return states.get(self.pid, "running")
    def lock(self, timeout_ms):
        if self.pid == 13: os._exit(3)
        if self.pid == 7: raise RuntimeError("CUDA_ERROR_NOT_READY")
        states[self.pid] = f"locked within {timeout_ms}"
    def checkpoint(self): states[self.pid] = "checkpointed"
    def restore(self, devices): states[self.pid] = f"restored {devices}"
    def unlock(self): states.pop(self.pid)
print(json.dumps({"ready": True}), flush=True)
known = commands(Process)
for line in sys.stdin:
    message = json.loads(line)
    try: answer = {"ok": known[message["do"]](message)}
    except Exception as error: answer = {"error": str(error)}
    print(json.dumps({"id": message["id"], **answer}), flush=True)
"""


@pytest_asyncio.fixture
async def agent() -> AsyncIterator[CudaAgent]:
    client = CudaAgent([sys.executable, "-c", STAND_IN])
    yield client
    await client.close()


async def test_operations_reach_the_process_with_their_arguments(agent: CudaAgent) -> None:
    assert await agent.state(5) == "running"
    await agent.lock(5, 1.5)
    assert await agent.state(5) == "locked within 1500"
    await agent.checkpoint(5)
    assert await agent.state(5) == "checkpointed"
    await agent.restore(5, {"a": "b"})
    assert await agent.state(5) == "restored {'a': 'b'}"
    await agent.unlock(5)
    assert await agent.state(5) == "running"


async def test_no_device_map_is_none(agent: CudaAgent) -> None:
    await agent.restore(5, {})
    assert await agent.state(5) == "restored None"


async def test_what_the_driver_refuses_is_told_with_operation_and_pid(agent: CudaAgent) -> None:
    with pytest.raises(Aborted) as refusal:
        await agent.lock(7, 1)
    assert refusal.value.reason == "CUDA_FAILED"
    assert refusal.value.metadata == {"operation": "lock", "pid": "7"}
    assert "CUDA_ERROR_NOT_READY" in refusal.value.message


async def test_an_agent_that_dies_fails_its_operation_and_is_started_again(agent: CudaAgent) -> None:
    with pytest.raises(Aborted) as refusal:
        await agent.lock(13, 1)
    assert refusal.value.reason == "CUDA_FAILED"
    assert "ended with status 3" in refusal.value.message

    assert await agent.state(5) == "running"


async def test_an_agent_that_cannot_start_is_told() -> None:
    client = CudaAgent([sys.executable, "-c", "raise SystemExit('no driver')"])
    with pytest.raises(Internal) as refusal:
        await client.state(1)
    assert refusal.value.reason == "CUDA_AGENT_FAILED"
    await client.close()

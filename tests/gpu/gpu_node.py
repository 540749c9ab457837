"""A real node on real GPUs, and what it leaves in their memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import psutil

from snapshotd.adapters.cuda.agent import CudaAgent
from snapshotd.adapters.cuda.weight_loader import SOCKET
from snapshotd.model import State
from snapshotd.preflight import open_nvml
from tests.node.node_under_test import NodeUnderTest

T = TypeVar("T")

MIB = 1 << 20
# In which the loader takes GPU memory.
UNIT = 2 * MIB
# What the driver itself takes and gives back in its own time.
SLACK = 64 * MIB
# Without it nothing can be refused before the driver begins.
UNSEEN = "NVML does not show what this machine's processes hold, as in some containers; run it outside"
SETTLE_SECONDS = 20.0
POLL_SECONDS = 0.02


class GpuNode(NodeUnderTest):
    """Starts on the GPU; ``answer`` is what the model says there."""

    @property
    def uuids(self) -> list[str]:
        return self.node.gpu_uuids()

    async def open_loader(self) -> None:
        """Start the loader of weights and have it open every GPU: what it takes of them is its own."""
        assert self.loader is not None
        await self.loader.prepare()
        folder = os.open(self.loader.directory, os.O_PATH)
        for gpu in self.uuids:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(f"/proc/self/fd/{folder}/{SOCKET}")
                connection.sendall(json.dumps({"gpu": gpu, "size": UNIT, "pieces": []}).encode() + b"\n")
                said, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 4096, 1)
                assert descriptors, said
                os.close(descriptors[0])
        os.close(folder)

    async def answers(self, instance: str) -> bool:
        return await self.generate(instance) == self.answer

    async def serves_or_is_cleanly_dead(self, instance: str) -> State:
        """What a fault may leave: it answers as ever, or no process of it is left."""
        known = self.instances.get(instance)
        if known.state is State.SERVING:
            assert await self.answers(instance)
        else:
            assert known.state is State.FAILED, known
            assert not (self.state_dir / "instances" / instance).exists()
            assert not (known.pid and psutil.pid_exists(known.pid))
        return known.state


def used() -> list[int]:
    """Bytes in use on each GPU of the machine, by whomever."""
    nvml = open_nvml()
    handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
    return [int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]


def free(index: int = 0) -> int:
    nvml = open_nvml()
    return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).free)


async def comes_back_to(before: list[int]) -> None:
    """Wait until no GPU holds more than it did: the kernel takes a process apart after its end."""
    await until(lambda: all(now <= then + SLACK for now, then in zip(used(), before, strict=True)))


async def until(condition: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s; memory in use: {used()}"
        await asyncio.sleep(POLL_SECONDS)


class Meddler:
    """The Cuda port of a node, with somebody who strikes in the middle of one operation.

    Args:
        operation: the one to strike in, the first time that it comes.
        after: seconds into it. It may be over by then, and the blow falls between two operations.
    """

    def __init__(self, node: GpuNode, operation: str, after: float, strike: Callable[[], None]) -> None:
        assert node.cuda is not None
        self._cuda = node.cuda
        self._operation = operation
        self._after = after
        self._strike = strike
        self.struck = False

    async def state(self, pid: int) -> str:
        return await self._meet("state", self._cuda.state(pid))

    async def lock(self, pid: int, timeout: float) -> None:
        await self._meet("lock", self._cuda.lock(pid, timeout))

    async def checkpoint(self, pid: int) -> None:
        await self._meet("checkpoint", self._cuda.checkpoint(pid))

    async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
        await self._meet("restore", self._cuda.restore(pid, devices))

    async def unlock(self, pid: int) -> None:
        await self._meet("unlock", self._cuda.unlock(pid))

    async def _meet(self, operation: str, work: Awaitable[T]) -> T:
        if self.struck or operation != self._operation:
            return await work
        self.struck = True
        working = asyncio.ensure_future(work)
        # Long enough to be under way, even if it is to be struck at once.
        await asyncio.wait([working], timeout=self._after)
        self._strike()
        return await working


def kill_performer(node: GpuNode) -> None:
    """End whoever performs CUDA operations for the node: the agent, or the programs that run now."""
    if isinstance(node.cuda, CudaAgent):
        agent = node.cuda._agent
        assert agent is not None
        os.kill(agent.process.pid, signal.SIGKILL)
        return
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if Path(child.exe()).name == "cuda-checkpoint":
                child.kill()

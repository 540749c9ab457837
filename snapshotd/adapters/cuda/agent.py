"""The Cuda port over the agent process, which is started when it is needed, and again after it has died."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence

from dumont.errors import Internal
from snapshotd.adapters.cuda.json_process import JsonProcess, NotStarted
from snapshotd.cuda import operations

START_TIMEOUT = 60.0


class CudaAgent:
    """Drives CUDA processes by the agent.

    Args:
        command: starts an agent with the protocol of ``snapshotd.cuda.agent``.
        limit: seconds that one operation may take.
    """

    def __init__(
        self,
        command: Sequence[str] = (sys.executable, "-m", "snapshotd.cuda.agent"),
        limit: float = operations.LIMIT,
    ) -> None:
        self.command = command
        self.limit = limit
        self._agent: JsonProcess | None = None
        self._retired: set[JsonProcess] = set()
        self._starting = asyncio.Lock()

    async def state(self, pid: int) -> str:
        return str(await self._ask("state", pid))

    async def lock(self, pid: int, timeout: float) -> None:
        await self._ask("lock", pid, timeout, timeout_ms=round(timeout * 1000))

    async def checkpoint(self, pid: int) -> None:
        await self._ask("checkpoint", pid)

    async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
        await self._ask("restore", pid, devices=dict(devices))

    async def unlock(self, pid: int) -> None:
        await self._ask("unlock", pid)

    async def prepare(self) -> None:
        """Start the agent, so that the first operation does not wait for it."""
        await self._running()

    async def close(self) -> None:
        agents = [*self._retired, *([self._agent] if self._agent else [])]
        self._agent = None
        self._retired.clear()
        for agent in agents:
            await agent.end()

    async def _running(self) -> JsonProcess:
        async with self._starting:
            if self._agent is None or self._agent.retired:
                self._agent = await self._start()
            return self._agent

    async def _ask(self, operation: str, pid: int, lock_timeout: float = 0.0, **arguments: object) -> object:
        agent = await self._running()
        seconds = operations.limit(operation, self.limit, lock_timeout)
        try:
            answer = await agent.ask({"do": operation, "pid": pid, **arguments}, seconds)
        except TimeoutError:
            self._replace(agent)
            raise operations.overdue(operation, pid, seconds) from None
        if "lost" in answer:
            raise operations.lost(operation, pid, "the CUDA agent", answer["lost"])
        if "error" in answer:
            raise operations.refused(operation, pid, answer["error"])
        return answer.get("ok")

    def _replace(self, agent: JsonProcess) -> None:
        """Retire an agent; the next operation starts another."""
        if self._agent is agent:
            self._agent = None
        self._retired = {other for other in self._retired if other.process.returncode is None} | {agent}
        agent.retire()

    async def _start(self) -> JsonProcess:
        try:
            return await JsonProcess.start(self.command, "CUDA agent", START_TIMEOUT)
        except NotStarted as error:
            raise Internal("CUDA_AGENT_FAILED", f"the {error}") from error

"""The Cuda port over the agent process, which is started when it is needed and again when it died."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence

import structlog

from dumont.errors import Internal
from snapshotd.cuda import operations
from snapshotd.model import Json

log = structlog.get_logger(__name__)

START_TIMEOUT = 60.0


class _Agent:
    """One agent process, and who waits for its answers."""

    def __init__(self, process: Process) -> None:
        self.process = process
        # Set when it ended, or may be asked nothing more.
        self.retired = False
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._ids = itertools.count(1)
        self._reading = asyncio.create_task(self._read(), name="cuda-agent")

    async def ask(self, message: Json, seconds: float) -> Json:
        """Its answer, ``{"lost": how}`` when it ends first.

        Raises:
            TimeoutError: there was none within ``seconds``.
        """
        number = next(self._ids)
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": number, **message}).encode() + b"\n")
        try:
            async with asyncio.timeout(seconds):
                return await answer
        finally:
            del self._waiting[number]
            self._end_if_idle()

    def retire(self) -> None:
        """Let it answer whom it can and end: an operation that never ends holds one of its threads."""
        self.retired = True
        self._end_if_idle()

    async def end(self) -> None:
        self.retired = True
        self._kill()
        await self._reading

    def _end_if_idle(self) -> None:
        if self.retired and not self._waiting:
            self._kill()

    def _kill(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            message = json.loads(line)
            self._answer(message["id"], message)
        status = await self.process.wait()
        if not self.retired:
            log.error("CUDA agent ended", status=status)
        self.retired = True
        for number in list(self._waiting):
            self._answer(number, {"lost": f"ended with status {status}"})

    def _answer(self, number: int, message: Json) -> None:
        answer = self._waiting.get(number)
        if answer is not None and not answer.done():
            answer.set_result(message)


class CudaAgent:
    def __init__(
        self,
        command: Sequence[str] = (sys.executable, "-m", "snapshotd.cuda.agent"),
        limit: float = operations.LIMIT,
    ) -> None:
        """
        Args:
            command: starts an agent that speaks as ``snapshotd.cuda.agent`` says.
            limit: seconds that one operation may take.
        """
        self.command = command
        self.limit = limit
        self._agent: _Agent | None = None
        self._retired: set[_Agent] = set()
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

    async def _running(self) -> _Agent:
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

    def _replace(self, agent: _Agent) -> None:
        """Have the next operation start another."""
        if self._agent is agent:
            self._agent = None
        self._retired = {other for other in self._retired if other.process.returncode is None} | {agent}
        agent.retire()

    async def _start(self) -> _Agent:
        process = await asyncio.create_subprocess_exec(
            *self.command, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT):
                ready = await process.stdout.readline()
        except TimeoutError:
            ready = b""
        if not ready:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise Internal(
                "CUDA_AGENT_FAILED", "the CUDA agent did not start; its reason is in the daemon's log"
            )
        return _Agent(process)

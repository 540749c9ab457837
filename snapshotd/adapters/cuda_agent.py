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

from dumont.errors import Aborted, Internal
from snapshotd.model import Json

log = structlog.get_logger(__name__)

START_TIMEOUT = 60.0
# A checkpoint copies all GPU memory to the host.
OPERATION_TIMEOUT = 300.0


class CudaAgent:
    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "snapshotd.cuda.agent")) -> None:
        """
        Args:
            command: starts an agent that speaks as ``snapshotd.cuda.agent`` says.
        """
        self.command = command
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._ids = itertools.count(1)
        self._starting = asyncio.Lock()

    async def state(self, pid: int) -> str:
        return str(await self._ask("state", pid))

    async def lock(self, pid: int, timeout: float) -> None:
        await self._ask("lock", pid, timeout_ms=round(timeout * 1000))

    async def checkpoint(self, pid: int) -> None:
        await self._ask("checkpoint", pid)

    async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
        await self._ask("restore", pid, devices=dict(devices))

    async def unlock(self, pid: int) -> None:
        await self._ask("unlock", pid)

    async def prepare(self) -> None:
        """Start the agent, so that the first operation does not wait for it."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                await self._start()

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _ask(self, command: str, pid: int, **arguments: object) -> object:
        await self.prepare()
        assert self._process is not None
        assert self._process.stdin is not None
        number = next(self._ids)
        future: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            message = {"id": number, "do": command, "pid": pid, **arguments}
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            async with asyncio.timeout(OPERATION_TIMEOUT):
                answer = await future
        except TimeoutError:
            raise Aborted(
                "CUDA_TIMEOUT", f"CUDA {command} of process {pid} did not end within {OPERATION_TIMEOUT:g} s"
            ) from None
        finally:
            self._waiting.pop(number, None)
        if "error" in answer:
            raise Aborted(
                "CUDA_FAILED",
                f"CUDA {command} of process {pid} failed: {answer['error']}",
                metadata={"operation": command, "pid": str(pid)},
            )
        return answer.get("ok")

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self.command, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT):
                ready = await self._process.stdout.readline()
        except TimeoutError:
            ready = b""
        if not ready:
            raise Internal(
                "CUDA_AGENT_FAILED", "the CUDA agent did not start; its reason is in the daemon's log"
            )
        self._reading = asyncio.create_task(self._read(self._process), name="cuda-agent")

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            message = json.loads(line)
            future = self._waiting.get(message["id"])
            if future is not None and not future.done():
                future.set_result(message)
        status = await process.wait()
        log.error("CUDA agent ended", status=status)
        for future in self._waiting.values():
            if not future.done():
                future.set_result({"error": f"the CUDA agent ended with status {status}"})

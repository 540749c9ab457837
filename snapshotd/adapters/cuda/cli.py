"""The Cuda port over NVIDIA's ``cuda-checkpoint``, one process for each operation."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from pathlib import Path

from dumont.errors import Internal
from snapshotd.cuda import operations


class CudaCheckpoint:
    """Drives CUDA processes by the program.

    Args:
        binary: the program.
        limit: seconds that one operation may take.
    """

    def __init__(self, binary: Path, limit: float = operations.LIMIT) -> None:
        self.binary = binary
        self.limit = limit

    async def state(self, pid: int) -> str:
        return (await self._run("state", pid, "--get-state")).lower()

    async def lock(self, pid: int, timeout: float) -> None:
        await self._act("lock", pid, "--timeout", str(round(timeout * 1000)), lock_timeout=timeout)

    async def checkpoint(self, pid: int) -> None:
        await self._act("checkpoint", pid)

    async def restore(self, pid: int, devices: Mapping[str, str]) -> None:
        pairs = ",".join(f"{old}={new}" for old, new in devices.items())
        await self._act("restore", pid, *(["--device-map", pairs] if pairs else []))

    async def unlock(self, pid: int) -> None:
        await self._act("unlock", pid)

    async def prepare(self) -> None:
        """Do nothing: no process runs before the first operation."""

    async def close(self) -> None:
        """Do nothing: no process runs between operations."""

    async def _act(self, action: str, pid: int, *options: str, lock_timeout: float = 0.0) -> None:
        await self._run(action, pid, "--action", action, *options, lock_timeout=lock_timeout)

    async def _run(self, operation: str, pid: int, *arguments: str, lock_timeout: float = 0.0) -> str:
        """Run the program and return its output."""
        seconds = operations.limit(operation, self.limit, lock_timeout)
        try:
            process = await asyncio.create_subprocess_exec(
                self.binary, *arguments, "--pid", str(pid), stdout=PIPE, stderr=PIPE, start_new_session=True
            )
        except OSError as error:
            raise Internal(
                "CUDA_AGENT_FAILED",
                f"{self.binary} cannot be run: {error}; set --cuda-checkpoint to the path of one that can",
            ) from error
        try:
            async with asyncio.timeout(seconds):
                output, complaint = await process.communicate()
        except TimeoutError:
            raise operations.overdue(operation, pid, seconds) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        status, said = process.returncode or 0, output.decode(errors="replace").strip()
        if status < 0:
            raise operations.lost(operation, pid, str(self.binary), f"ended by signal {-status}")
        if status:
            raise operations.refused(operation, pid, complaint.decode(errors="replace").strip() or said)
        return said

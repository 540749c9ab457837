"""The WeightLoader port over the loader's process, which is started again when it died."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

SOCKET = "loader.sock"
START_TIMEOUT = 60.0


class LoaderProcess:
    """Serves orders on ``loader.sock`` in the directory of the node's weight files."""

    def __init__(
        self, directory: Path, command: Sequence[str] = (sys.executable, "-m", "snapshotd.cuda.loader")
    ) -> None:
        """
        Args:
            directory: the node's weight files.
            command: starts a loader that speaks as ``snapshotd.cuda.loader`` says.
        """
        self.directory = directory
        self.command = command
        self._process: Process | None = None
        self._starting: asyncio.Task[None] | None = None

    async def ready(self) -> bool:
        if self._starting is not None and not self._starting.done():
            return False
        if self._process is not None and self._process.returncode is None:
            return True
        if self._process is not None:
            log.error("weight loader ended", status=self._process.returncode)
        # A restore does not wait for it: the model host copies its weights itself this time.
        self._starting = asyncio.create_task(self.prepare(), name="weight-loader")
        return False

    async def prepare(self) -> None:
        """Start it, so that the first order finds it ready."""
        command = [*self.command, "--socket", str(self.directory / SOCKET), "--files", str(self.directory)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT):
                ready = await process.stdout.readline()
        except TimeoutError:
            ready = b""
        if not ready:
            log.error("weight loader did not start; model hosts copy their weights themselves")
            if process.returncode is None:
                process.kill()
            await process.wait()
        self._process = process

    def files_left(self) -> None:
        """Tell it that files have left the directory, so that it lets go of their memory."""
        if self._process is not None and self._process.returncode is None and self._process.stdin is not None:
            self._process.stdin.write(b"\n")

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

"""The WeightLoader port over the loader's process, which is started again after it has died."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import structlog

from snapshotd.adapters.cuda.json_process import JsonProcess, NotStarted
from snapshotd.ports import Clock

log = structlog.get_logger(__name__)

SOCKET = "loader.sock"
# Seconds.
START_TIMEOUT = 60.0
REGISTER_TIMEOUT = 60.0
# An order that still reads an evicted file takes a second at most.
LEAVE_TIMEOUT = 10.0
# Seconds between two starts: what ended one loader often ends the next one too.
PAUSE = 60.0


def available() -> bool:
    """Whether the package is installed through which the loader drives GPUs."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


class LoaderProcess:
    """The loader, which takes orders on ``loader.sock`` in the directory of the node's weight cache.

    Args:
        directory: the weight cache.
        cached: lists the files that are there, which a new loader registers.
        command: starts a loader with the protocol of ``snapshotd.cuda.loader``.
        leave_timeout: seconds in which it must release evicted files.
    """

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        cached: Callable[[], Iterable[str]],
        command: Sequence[str] = (sys.executable, "-m", "snapshotd.cuda.loader"),
        leave_timeout: float = LEAVE_TIMEOUT,
    ) -> None:
        self.directory = directory
        self.command = [*command, "--socket", str(directory / SOCKET), "--files", str(directory)]
        self._clock = clock
        self._cached = cached
        self._leave_timeout = leave_timeout
        self._process: JsonProcess | None = None
        self._starting: asyncio.Task[None] | None = None
        # When it was last started.
        self._started = float("-inf")
        self._registering: set[asyncio.Task[None]] = set()

    async def ready(self) -> bool:
        if self._runs():
            return True
        # A restore does not wait for the start: the model host copies its weights itself this time.
        if self._clock.monotonic() - self._started >= PAUSE:
            self.begin()
        return False

    def begin(self) -> None:
        """Start it in the background, unless it runs or is being started."""
        if not self._runs() and (self._starting is None or self._starting.done()):
            self._starting = asyncio.create_task(self._start(), name="weight loader's start")

    async def prepare(self) -> None:
        """Start it and wait until it is ready or has failed."""
        self.begin()
        if self._starting is not None:
            await asyncio.shield(self._starting)

    def file_came(self, digest: str) -> None:
        """Register a new file in the background, so that the first order for it need not wait."""
        if self._process is not None and self._runs():
            task = asyncio.create_task(self._register(self._process, digest), name=f"register {digest}")
            self._registering.add(task)
            task.add_done_callback(self._registering.discard)

    async def files_left(self) -> None:
        """Make it release evicted files. Afterwards it holds none of their memory."""
        if self._process is None or not self._runs():
            return
        try:
            answer = await self._process.ask({"left": True}, self._leave_timeout)
        except TimeoutError:
            answer = {"error": f"no answer within {self._leave_timeout:g} s"}
        if "error" in answer:
            log.error("weight_loader_ended", why="it did not release evicted files", error=answer["error"])
            await self._process.end()

    async def close(self) -> None:
        for task in (*self._registering, *([self._starting] if self._starting else [])):
            task.cancel()
            await asyncio.wait([task])
        if self._process is not None:
            await self._process.end()

    def _runs(self) -> bool:
        return self._process is not None and not self._process.retired

    async def _start(self) -> None:
        self._started = self._clock.monotonic()
        try:
            self._process = await JsonProcess.start(self.command, "weight loader", START_TIMEOUT)
        except (NotStarted, OSError) as error:
            log.error("weight_loader_not_started", error=str(error))
            return
        finally:
            self._started = self._clock.monotonic()
        for digest in self._cached():
            self.file_came(digest)

    async def _register(self, process: JsonProcess, digest: str) -> None:
        try:
            answer = await process.ask({"register": digest}, REGISTER_TIMEOUT)
        except TimeoutError:
            answer = {"error": f"no answer within {REGISTER_TIMEOUT:g} s"}
        if said := answer.get("error") or answer.get("lost"):
            log.warning("weights_not_registered", digest=digest, error=said)

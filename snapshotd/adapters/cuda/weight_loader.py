"""The WeightLoader port over the loader's process, which is started again when it died."""

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
# An order that still reads a file which left takes a second at most.
LEAVE_TIMEOUT = 10.0
# At least between two starts: what ended one loader often ends the next.
PAUSE = 60.0


def available() -> bool:
    """Whether the package that the loader drives GPUs through is installed."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


class LoaderProcess:
    """Serves orders on ``loader.sock`` in the directory of the node's weight files."""

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        cached: Callable[[], Iterable[str]],
        command: Sequence[str] = (sys.executable, "-m", "snapshotd.cuda.loader"),
        leave_timeout: float = LEAVE_TIMEOUT,
    ) -> None:
        """
        Args:
            directory: the node's weight files.
            cached: names of those that are there, for a loader that starts to register.
            command: starts a loader that speaks as ``snapshotd.cuda.loader`` says.
            leave_timeout: seconds in which it lets go of files that left.
        """
        self.directory = directory
        self.command = [*command, "--socket", str(directory / SOCKET), "--files", str(directory)]
        self._clock = clock
        self._cached = cached
        self._leave_timeout = leave_timeout
        self._process: JsonProcess | None = None
        self._starting: asyncio.Task[None] | None = None
        # Of its last start.
        self._started = float("-inf")
        self._registering: set[asyncio.Task[None]] = set()

    async def ready(self) -> bool:
        if self._runs():
            return True
        # A restore does not wait for it: the model host copies its weights itself this time.
        if self._clock.monotonic() - self._started >= PAUSE:
            self.begin()
        return False

    def begin(self) -> None:
        """Have it started, unless it runs or starts already; nobody waits."""
        if not self._runs() and (self._starting is None or self._starting.done()):
            self._starting = asyncio.create_task(self._start(), name="weight loader's start")

    async def prepare(self) -> None:
        """Start it and wait until it is ready or has failed."""
        self.begin()
        if self._starting is not None:
            await asyncio.shield(self._starting)

    def file_came(self, digest: str) -> None:
        """Have it register a file, so that the first order for it does not wait for that."""
        if self._process is not None and self._runs():
            task = asyncio.create_task(self._register(self._process, digest), name=f"register {digest}")
            self._registering.add(task)
            task.add_done_callback(self._registering.discard)

    async def files_left(self) -> None:
        """Have it let go of files that left the directory; it keeps none of their memory afterwards."""
        if self._process is None or not self._runs():
            return
        try:
            answer = await self._process.ask({"left": True}, self._leave_timeout)
        except TimeoutError:
            answer = {"error": f"no answer within {self._leave_timeout:g} s"}
        if "error" in answer:
            log.error("weight loader keeps memory of files that left, and is ended", error=answer["error"])
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
            log.error("model hosts copy their weights themselves", error=str(error))
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
            log.warning("weights are not registered ahead", digest=digest, error=said)

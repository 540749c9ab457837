"""A child process that is asked and answers in JSON objects, one a line on its stdin and stdout."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

import structlog

from snapshotd.model import Json

log = structlog.get_logger(__name__)


class NotStarted(Exception):
    """The process ended, or said nothing in time; its reason is in the daemon's log."""


class JsonProcess:
    """A process that said that it is ready, and who waits for its answers."""

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        # Set when it ended, or may be asked nothing more.
        self.retired = False
        self._name = name
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._ids = itertools.count(1)
        self._reading = asyncio.create_task(self._read(), name=name)

    @classmethod
    async def start(cls, command: Sequence[str], name: str, seconds: float) -> JsonProcess:
        """Start it and wait for ``{"ready": true}``.

        Args:
            name: for the log.
            seconds: that it may take.

        Raises:
            NotStarted: it did not say so.
        """
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        try:
            async with asyncio.timeout(seconds):
                while (message := await _next(process, name)) is not None:
                    if message.get("ready"):
                        return cls(process, name)
        except TimeoutError:
            pass
        except BaseException:
            await _end(process)
            raise
        await _end(process)
        raise NotStarted(f"{name} did not start; its reason is in the daemon's log")

    async def ask(self, message: Json, seconds: float) -> Json:
        """Its answer, ``{"lost": how}`` when it ends first.

        Raises:
            TimeoutError: there was none within ``seconds``.
        """
        if self._reading.done():
            return {"lost": "had ended"}
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
        """Kill it; it is gone, and all that it held, when this returns."""
        self.retired = True
        _kill(self.process)
        await asyncio.shield(self._reading)

    def _end_if_idle(self) -> None:
        if self.retired and not self._waiting:
            _kill(self.process)

    async def _read(self) -> None:
        while (message := await _next(self.process, self._name)) is not None:
            self._answer(message.get("id"), message)
        status = await self.process.wait()
        if not self.retired:
            log.error(f"{self._name} ended", status=status)
        self.retired = True
        for number in list(self._waiting):
            self._answer(number, {"lost": f"ended with status {status}"})

    def _answer(self, number: object, message: Json) -> None:
        answer = self._waiting.get(number) if isinstance(number, int) else None
        if answer is not None and not answer.done():
            answer.set_result(message)


async def _next(process: Process, name: str) -> Json | None:
    """What it says next, without what is no message; None: it ended."""
    assert process.stdout is not None
    while True:
        line = b""
        try:
            line = await process.stdout.readline()
            if not line:
                return None
            message = json.loads(line)
        except ValueError:
            # Also of a line that is too long to be one.
            message = None
        if isinstance(message, dict):
            return message
        log.warning(f"{name} said what is no message", line=line[:200].decode(errors="replace"))


async def _end(process: Process) -> None:
    _kill(process)
    await process.wait()


def _kill(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()

"""A child process that takes requests and answers them in JSON lines, on its stdin and stdout."""

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
    """The process ended, or was not ready in time. What it wrote to standard error is in the daemon's log."""


class JsonProcess:
    """A process that is ready, and the requests that wait for its answers.

    Attributes:
        retired: it has ended, or must not be asked any more.
    """

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        self.retired = False
        self._name = name
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._ids = itertools.count(1)
        self._reading = asyncio.create_task(self._read(), name=name)

    @classmethod
    async def start(cls, command: Sequence[str], name: str, seconds: float) -> JsonProcess:
        """Start a process and wait until it sends ``{"ready": true}``.

        Args:
            name: names the process in the log.
            seconds: how long to wait.

        Raises:
            NotStarted: it ended, or did not send that in time.
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
        """Send a request and wait for its answer, which is ``{"lost": how}`` if the process ends first.

        Raises:
            TimeoutError: there was no answer within ``seconds``.
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
        """End the process once it has answered all requests, because one that hangs occupies a thread."""
        self.retired = True
        self._end_if_idle()

    async def end(self) -> None:
        """Kill the process and wait until it has ended and everything that it held is free."""
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
            log.error("process_ended", process=self._name, status=status)
        self.retired = True
        for number in list(self._waiting):
            self._answer(number, {"lost": f"ended with status {status}"})

    def _answer(self, number: object, message: Json) -> None:
        answer = self._waiting.get(number) if isinstance(number, int) else None
        if answer is not None and not answer.done():
            answer.set_result(message)


async def _next(process: Process, name: str) -> Json | None:
    """The next message of a process; None if it has ended. Other lines are logged and skipped."""
    assert process.stdout is not None
    while True:
        line = b""
        try:
            line = await process.stdout.readline()
            if not line:
                return None
            message = json.loads(line)
        except ValueError:
            # Not JSON, or a line that is too long.
            message = None
        if isinstance(message, dict):
            return message
        log.warning("message_not_understood", process=name, line=line[:200].decode(errors="replace"))


async def _end(process: Process) -> None:
    _kill(process)
    await process.wait()


def _kill(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()

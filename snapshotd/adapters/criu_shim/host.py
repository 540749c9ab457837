"""The Host port over one connection to a shim."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from dumont.errors import ERRORS, Aborted, DumontError, Unavailable
from snapshotd.model import Json
from snapshotd.system.freezer import cgroup2_root, group_below, processes_in, remove_group
from snapshotd.system.memory_limit import memory_root, remove_memory_group

log = structlog.get_logger(__name__)

SHIM_ANSWER_TIMEOUT = 10.0
# A shim that is dumping for a daemon that has died answers only when CRIU is done.
FIND_TIMEOUT = 120.0
# The kernel needs time to free the memory of a large process, some of it on a GPU.
RELEASE_TIMEOUT = 120.0
# Far more than the largest message of a model host, the canary of a long prompt, has bytes.
LINE_LIMIT = 1 << 20


class ShimHost:
    """A model host and its shim, over a connection to the shim."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.shim = path.stem
        self._path = path
        self.instance = ""
        self.pid = 0
        self.lost = asyncio.Event()
        # How the model host has ended, as far as its shim could see.
        self.end = ""
        self.lost_reason = "HOST_LOST"
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._of_host: set[int] = set()
        self._ids = itertools.count(1)
        self._reading = asyncio.create_task(self._read(reader), name=f"shim-{self.shim}")
        # A descriptor of the model host's process, so that it can be ended without its shim.
        self._process = -1

    @classmethod
    async def connect(cls, path: Path) -> ShimHost:
        # By descriptor: a socket's path may have 107 bytes, and a state directory may be deep.
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            reader, writer = await asyncio.open_unix_connection(
                f"/proc/self/fd/{folder}/{path.name}", limit=LINE_LIMIT
            )
        finally:
            os.close(folder)
        return cls(path, reader, writer)

    async def launch(
        self,
        instance: str,
        directory: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        engine: str = "",
    ) -> None:
        answer = await self._ask(
            {
                "do": "launch",
                "instance": instance,
                "directory": str(directory),
                "command": list(command),
                "environment": dict(environment),
                "engine": engine,
            },
            SHIM_ANSWER_TIMEOUT,
        )
        self._hold(instance, answer["pid"])

    async def restore(
        self,
        instance: str,
        directory: Path,
        images: Path,
        origin: Path,
        mounts: Sequence[str],
        pipes: Mapping[str, int],
        timeout: float,
    ) -> None:
        answer = await self._ask(
            {
                "do": "restore",
                "instance": instance,
                "directory": str(directory),
                "images": str(images),
                "origin": str(origin),
                "mounts": list(mounts),
                "pipes": dict(pipes),
                "timeout": timeout,
            },
            timeout + SHIM_ANSWER_TIMEOUT,
        )
        self._hold(instance, answer["pid"])

    async def prepare(self, images: Path, timeout: float) -> None:
        await self._ask({"do": "prepare", "images": str(images)}, timeout)

    async def abandon(self) -> None:
        await self._ask({"do": "abandon"}, SHIM_ANSWER_TIMEOUT)

    async def dump(self, images: Path, timeout: float) -> Json:
        request = {"do": "dump", "images": str(images), "timeout": timeout}
        return await self._ask(request, timeout + SHIM_ANSWER_TIMEOUT)

    async def call(self, command: str, timeout: float, **arguments: object) -> Json:
        return await self._ask({"do": "host", "message": {"do": command, **arguments}}, timeout)

    async def freeze(self) -> None:
        await self._ask({"do": "freeze"}, SHIM_ANSWER_TIMEOUT)

    async def thaw(self) -> None:
        await self._ask({"do": "thaw"}, SHIM_ANSWER_TIMEOUT)

    async def status(self) -> Json:
        return await self._ask({"do": "status"}, SHIM_ANSWER_TIMEOUT)

    async def adopt(self) -> bool:
        """Learn which model host an earlier daemon left in the shim; False if it is empty.

        Raises:
            Unavailable, Aborted: the shim has ended, or does not answer.
        """
        status = await self._ask({"do": "status"}, FIND_TIMEOUT)
        if not status["instance"]:
            return False
        self._hold(status["instance"], status["pid"])
        if status["exit_status"] is not None:
            self.lost.set()
        return True

    async def release(self) -> None:
        try:
            await self._ask({"do": "release"}, RELEASE_TIMEOUT)
        except Unavailable:
            log.warning("shim_gone_before_release", shim=self.shim)
            await self._end_orphan()
            await forget(self._path)
        # The shim closes the connection once it has removed its mounts.
        await self._reading
        await self.disconnect()

    async def disconnect(self) -> None:
        """Disconnect from the shim. It and its model host run on."""
        if self._process >= 0:
            os.close(self._process)
            self._process = -1
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        self._writer.close()

    def kill(self) -> None:
        """Kill a shim that does not answer, and its children."""
        try:
            peer = self._writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            # The connection is closed, because the shim has ended.
            return
        shim, _, _ = struct.unpack("iII", peer)
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{shim}/task/{shim}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            os.kill(shim, signal.SIGKILL)

    @property
    def connected(self) -> bool:
        return not self._reading.done()

    def _hold(self, instance: str, pid: int) -> None:
        self.instance, self.pid = instance, pid
        with contextlib.suppress(ProcessLookupError):
            self._process = os.pidfd_open(pid)

    async def _end_orphan(self) -> None:
        """End the model host of a shim that has ended. A frozen one would otherwise stay for ever."""
        if self._process < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        await until_ended(self._process)

    async def _ask(self, message: Json, timeout: float) -> Json:
        number = next(self._ids)
        future: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        if message["do"] == "host":
            self._of_host.add(number)
        command = message.get("message", message)["do"]
        try:
            if self._reading.done() or (message["do"] == "host" and self.lost.is_set()):
                raise self._gone(command)
            self._writer.write(json.dumps(message | {"id": number}).encode() + b"\n")
            async with asyncio.timeout(timeout):
                answer = await future
        except TimeoutError:
            raise Aborted(
                "HOST_TIMEOUT",
                f"the model host gave no answer to {command} within {timeout:g} s",
                metadata={"command": command},
            ) from None
        finally:
            self._waiting.pop(number, None)
            self._of_host.discard(number)
        if "error" in answer:
            raise _error(command, answer["error"])
        ok: Json = answer["ok"]
        return ok

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if message.get("event") == "exited":
                    self.end = _described(message["status"], message.get("said", ""))
                    if bound := message.get("memory_limit"):
                        self.lost_reason = "HOST_OUT_OF_MEMORY"
                        self.end = (
                            f"it needed more memory than the {bound} bytes that it may have; choose a "
                            f"smaller model, or raise --host-memory-bytes ({self.end})"
                        )
                    log.info("model_host_ended", shim=self.shim, status=message["status"])
                    self._lose(self._of_host)
                elif (future := self._waiting.get(message["id"])) is not None and not future.done():
                    future.set_result(message)
        except ConnectionError:
            pass
        finally:
            self._lose(self._waiting)

    def _lose(self, unanswerable: Iterable[int]) -> None:
        """Fail the requests that will not be answered. A shim without a model host still answers its own."""
        self.lost.set()
        for number in unanswerable:
            future = self._waiting[number]
            if not future.done():
                future.set_exception(self._gone("a command"))

    def _gone(self, command: str) -> DumontError:
        return Unavailable(
            self.lost_reason,
            f"the model host ended before it answered {command}{self.end and f': {self.end}'}",
            metadata={"shim": self.shim},
        )


async def forget(path: Path, keep_log: bool = False) -> None:
    """End what a shim that is gone has left, and remove its files and cgroups.

    Args:
        path: of its socket.
        keep_log: leave what it said at its end.
    """
    for root in (cgroup2_root(), memory_root()):
        if root is not None:
            group = group_below(root, path.stem)
            # A cgroup can be removed once the last process in it has ended, and one that ends takes a while.
            for pid in processes_in(group):
                await _end(pid, group)
    path.unlink(missing_ok=True)
    path.with_name(f".{path.name}").unlink(missing_ok=True)
    if not keep_log:
        path.with_suffix(".log").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.with_name(f"{path.name}.root").rmdir()
    remove_group(path.stem)
    remove_memory_group(path.stem)


async def _end(pid: int, group: Path) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Again, now that the number cannot become another's.
        if pid in processes_in(group):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            await until_ended(process)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)


def _described(status: int, said: str) -> str:
    """How a process has ended, by its wait status and the last line of its log."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {entry.value: entry.name for entry in signal.Signals}
        how = f"ended by {names.get(number, f'signal {number}')}"
    else:
        how = f"exit status {os.waitstatus_to_exitcode(status)}"
    return f"{how}, and the last line of its log is: {said}" if said else how


def _error(command: str, error: Json) -> DumontError:
    """The error that a model host or a shim has answered."""
    kind = ERRORS.get(str(error.get("code")), Aborted)
    return kind(
        str(error.get("reason", "HOST_FAILED")),
        str(error.get("message", "")),
        metadata={"command": command, **error.get("metadata", {})},
        field=error.get("field"),
    )


async def until_ended(process: int) -> None:
    """Wait until the process of a descriptor has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process)

"""The Host and Hosts ports over shim processes and their sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from dumont.errors import ERRORS, Aborted, DumontError, Internal, Unavailable
from dumont.names import new_id
from snapshotd.model import Json

log = structlog.get_logger(__name__)

SHIM_READY_TIMEOUT = 30.0
SHIM_ANSWER_TIMEOUT = 10.0
# A message of the model host is far below this; the canary of a long prompt is the largest.
LINE_LIMIT = 1 << 20


class ShimHost:
    """The Host port over one connection to a shim."""

    def __init__(self, shim: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.shim = shim
        self.instance = ""
        self.pid = 0
        self.lost = asyncio.Event()
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._of_host: set[int] = set()
        self._ids = itertools.count(1)
        self._reading = asyncio.create_task(self._read(reader), name=f"shim-{shim}")

    @classmethod
    async def connect(cls, socket: Path) -> ShimHost:
        # By descriptor: a socket's path may have 107 bytes, and a state directory may be deep.
        folder = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            reader, writer = await asyncio.open_unix_connection(
                f"/proc/self/fd/{folder}/{socket.name}", limit=LINE_LIMIT
            )
        finally:
            os.close(folder)
        return cls(socket.stem, reader, writer)

    async def launch(
        self, instance: str, directory: Path, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        answer = await self._ask(
            {
                "do": "launch",
                "instance": instance,
                "directory": str(directory),
                "command": list(command),
                "environment": dict(environment),
            },
            SHIM_ANSWER_TIMEOUT,
        )
        self.instance, self.pid = instance, answer["pid"]

    async def restore(
        self,
        instance: str,
        directory: Path,
        images: Path,
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
                "mounts": list(mounts),
                "pipes": dict(pipes),
                "timeout": timeout,
            },
            timeout + SHIM_ANSWER_TIMEOUT,
        )
        self.instance, self.pid = instance, answer["pid"]

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

    async def release(self) -> None:
        try:
            await self._ask({"do": "release"}, SHIM_ANSWER_TIMEOUT)
        except Unavailable:
            # Already gone, and with it the process it was the parent of the namespace of.
            log.warning("shim was gone before its release", shim=self.shim)
        # The shim closes the connection when it has removed its mounts and ends.
        await self._reading
        await self.disconnect()

    async def disconnect(self) -> None:
        """Let go of the shim; it and its model host run on."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        self._writer.close()

    async def _ask(self, message: Json, timeout: float) -> Json:
        number = next(self._ids)
        future: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        if message["do"] == "host":
            self._of_host.add(number)
        command = message.get("message", message)["do"]
        try:
            if self._reading.done():
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
                    log.info("model host ended", shim=self.shim, status=message["status"])
                    self._lose(self._of_host)
                elif (future := self._waiting.get(message["id"])) is not None and not future.done():
                    future.set_result(message)
        except ConnectionError:
            pass
        finally:
            self._lose(self._waiting)

    def _lose(self, unanswerable: Iterable[int]) -> None:
        """The model host is gone; the shim, while it is there, still answers for itself."""
        self.lost.set()
        for number in unanswerable:
            future = self._waiting[number]
            if not future.done():
                future.set_exception(self._gone("a command"))

    def _gone(self, command: str) -> DumontError:
        return Unavailable(
            "HOST_LOST", f"the model host ended before it answered {command}", metadata={"shim": self.shim}
        )


def _error(command: str, error: Json) -> DumontError:
    """The refusal of a model host or shim, in the class that the model host gave it."""
    kind = ERRORS.get(str(error.get("code")), Aborted)
    return kind(
        str(error.get("reason", "HOST_FAILED")),
        str(error.get("message", "")),
        metadata={"command": command, **error.get("metadata", {})},
        field=error.get("field"),
    )


class ShimPool:
    """The Hosts port: starts shims, keeps one spare, finds those of an earlier daemon."""

    def __init__(self, directory: Path, criu: Path, pycriu: Path | None) -> None:
        """
        Args:
            directory: where the shims' sockets lie; private to root.
            criu: the CRIU binary.
            pycriu: directory that holds the package pycriu; None: it is on Python's path.
        """
        self.directory = directory
        self.criu = criu
        self.pycriu = pycriu
        self._spare: asyncio.Task[ShimHost] | None = None
        self._hosts: set[ShimHost] = set()
        self._ends: set[asyncio.Task[None]] = set()

    async def take(self) -> ShimHost:
        spare, self._spare = self._spare, None
        host: ShimHost | None = None
        if spare is not None:
            with contextlib.suppress(DumontError):
                host = await spare
        if host is None or host.lost.is_set():
            host = await self._start()
        self.prepare()
        self._hosts.add(host)
        return host

    def prepare(self) -> None:
        """Start the next spare, unless there is one."""
        if self._spare is None:
            self._spare = asyncio.create_task(self._start(), name="spare-shim")

    async def find(self) -> list[ShimHost]:
        found = []
        for socket in sorted(self.directory.glob("*.sock")):
            try:
                host = await ShimHost.connect(socket)
                status = await host.status()
            except (OSError, DumontError):
                # No shim listens any more; its mounts went with it.
                _forget(socket)
                continue
            if status["instance"]:
                host.instance, host.pid = status["instance"], status["pid"]
                if status["exit_status"] is not None:
                    host.lost.set()
                self._hosts.add(host)
                found.append(host)
            else:
                await host.release()
        return found

    async def close(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(DumontError):
                await (await spare).release()
        for host in self._hosts:
            await host.disconnect()

    async def _start(self) -> ShimHost:
        shim = new_id("shim")
        socket = self.directory / f"{shim}.sock"
        command = [
            sys.executable,
            "-m",
            "snapshotd.shim.main",
            "--socket",
            str(socket),
            "--criu",
            str(self.criu),
        ]
        if self.pycriu is not None:
            command += ["--pycriu", str(self.pycriu)]
        process = _spawn(command, socket.with_suffix(".log"))
        ended = asyncio.create_task(_wait(process), name=f"{shim}-ended")
        # Held here: the loop alone would let it be collected.
        self._ends.add(ended)
        ended.add_done_callback(self._ends.discard)
        try:
            async with asyncio.timeout(SHIM_READY_TIMEOUT):
                while not socket.exists():
                    if ended.done():
                        raise Internal(
                            "SHIM_FAILED", f"the shim ended with status {process.returncode} at its start"
                        )
                    await asyncio.sleep(0.005)
        except TimeoutError:
            process.kill()
            raise Internal("SHIM_FAILED", f"the shim was not ready within {SHIM_READY_TIMEOUT:g} s") from None
        return await ShimHost.connect(socket)


def _spawn(command: Sequence[str], complaints: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: what ends the daemon must not end the models."""
    with complaints.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _forget(socket: Path) -> None:
    """Remove the files of a shim that is gone."""
    socket.unlink(missing_ok=True)
    socket.with_suffix(".log").unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        socket.with_name(f"{socket.name}.root").rmdir()


async def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a child without a thread, so that it leaves no zombie."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
        process.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)

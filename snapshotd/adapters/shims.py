"""The Host and Hosts ports over shim processes and their sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import structlog

from dumont.errors import ERRORS, Aborted, DumontError, Internal, Unavailable
from dumont.names import new_id
from snapshotd.model import Json
from snapshotd.shim import mounts
from snapshotd.shim.freezer import remove_group

log = structlog.get_logger(__name__)

SHIM_READY_TIMEOUT = 30.0
SHIM_ANSWER_TIMEOUT = 10.0
# The kernel takes apart what a large process holds, some of it on a GPU.
RELEASE_TIMEOUT = 120.0
# A shim that dumps for a daemon that died answers nobody until CRIU is done.
FIND_TIMEOUT = 120.0
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
        # The model host's process, held so that it can be ended without its shim.
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
        return cls(path.stem, reader, writer)

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
        """Learn what an earlier daemon left in it; False when it is empty.

        Raises:
            Unavailable, Aborted: the shim is gone, or does nothing any more.
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
            log.warning("shim was gone before its release", shim=self.shim)
            await self._end_orphan()
        # The shim closes the connection when it has removed its mounts and ends.
        await self._reading
        await self.disconnect()

    async def disconnect(self) -> None:
        """Let go of the shim; it and its model host run on."""
        if self._process >= 0:
            os.close(self._process)
            self._process = -1
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        self._writer.close()

    def kill(self) -> None:
        """End a shim that does not answer, and its children."""
        peer = self._writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
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
        """End the model host of a shim that is gone; a frozen one would stay for ever."""
        if self._process < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        await _ended(self._process)
        remove_group(self.shim)

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

    def __init__(self, directory: Path, criu: Path, pycriu: Path | None, weights: Path | None = None) -> None:
        """
        Args:
            directory: where the shims' sockets lie; private to root.
            criu: the CRIU binary.
            pycriu: directory that holds the package pycriu; None: it is on Python's path.
            weights: the node's weight cache, mounted before the first shim is started; None: it has none.
        """
        self.directory = directory
        self.criu = criu
        self.pycriu = pycriu
        self.weights = weights
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
        self._hosts = {known for known in self._hosts if known.connected} | {host}
        return host

    def prepare(self) -> None:
        """Start the next spare, unless there is one."""
        if self._spare is None:
            self._spare = asyncio.create_task(self._start(), name="spare-shim")

    async def find(self) -> list[ShimHost]:
        paths = sorted(self.directory.glob("*.sock"))
        found = [host for host in await asyncio.gather(*map(self._find, paths)) if host is not None]
        self._hosts |= set(found)
        self._clear({host.shim for host in found})
        return found

    def _clear(self, living: AbstractSet[str]) -> None:
        """Remove what shims left that ended, or were ended, before they had a socket."""
        for path in list(self.directory.iterdir()):
            shim = path.name.removeprefix(".").partition(".")[0]
            if shim not in living:
                _forget(self.directory / f"{shim}.sock")

    async def _find(self, path: Path) -> ShimHost | None:
        try:
            host = await ShimHost.connect(path)
        except OSError:
            # No shim listens any more; its mounts went with it.
            _forget(path)
            return None
        try:
            if await host.adopt():
                return host
            await host.release()
        except DumontError as error:
            log.error("shim did not answer and is ended", shim=host.shim, reason=error.reason)
            host.kill()
            await host.disconnect()
            _forget(path)
        return None

    def mounts(self) -> set[str]:
        own = {mounts.INSTANCE_MOUNT, mounts.MEMORY_MOUNT}
        return {*mounts.node_mounts(), *own, *([mounts.WEIGHTS_MOUNT] if self.weights else [])}

    async def close(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(DumontError):
                await (await spare).release()
        for host in self._hosts:
            await host.disconnect()

    async def _start(self) -> ShimHost:
        shim = new_id("shim")
        path = self.directory / f"{shim}.sock"
        command = [
            sys.executable,
            "-m",
            "snapshotd.shim.main",
            "--socket",
            str(path),
            "--criu",
            str(self.criu),
            "--daemon",
            str(os.getpid()),
        ]
        if self.pycriu is not None:
            command += ["--pycriu", str(self.pycriu)]
        if self.weights is not None:
            command += ["--weights", str(self.weights)]
        process = _spawn(command, path.with_suffix(".log"))
        ended = asyncio.create_task(_wait(process), name=f"{shim}-ended")
        # Held here: the loop alone would let it be collected.
        self._ends.add(ended)
        ended.add_done_callback(self._ends.discard)
        try:
            async with asyncio.timeout(SHIM_READY_TIMEOUT):
                while not path.exists():
                    if ended.done():
                        raise Internal(
                            "SHIM_FAILED",
                            f"the shim ended with status {process.returncode} at its start: "
                            f"{_last_words(path.with_suffix('.log'))}",
                        )
                    await asyncio.sleep(0.005)
            return await ShimHost.connect(path)
        except BaseException as error:
            # Also when whoever waits for it is cancelled: nobody would know of it.
            process.kill()
            _forget(path, keep_log=isinstance(error, DumontError))
            if isinstance(error, TimeoutError):
                raise Internal(
                    "SHIM_FAILED", f"the shim was not ready within {SHIM_READY_TIMEOUT:g} s"
                ) from None
            raise


def _spawn(command: Sequence[str], complaints: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: what ends the daemon must not end the models."""
    with complaints.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line[:500] for line in reversed(lines) if line.strip()), "it said nothing")


def _forget(path: Path, keep_log: bool = False) -> None:
    """Remove the files of a shim that is gone; ``keep_log``: but for what it said at its end."""
    path.unlink(missing_ok=True)
    path.with_name(f".{path.name}").unlink(missing_ok=True)
    if not keep_log:
        path.with_suffix(".log").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.with_name(f"{path.name}.root").rmdir()


async def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a child without a thread, so that it leaves no zombie."""
    descriptor = os.pidfd_open(process.pid)
    try:
        await _ended(descriptor)
        process.wait()
    finally:
        os.close(descriptor)


async def _ended(process: int) -> None:
    """Wait until a process, given by its descriptor, has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process)

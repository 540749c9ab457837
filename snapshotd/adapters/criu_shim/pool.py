"""The Hosts port: start shims, keep a spare one, and find those of an earlier daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import MappingProxyType

import structlog

from dumont.errors import DumontError, Internal
from dumont.names import new_id
from snapshotd.adapters.criu_shim.host import ShimHost, forget, until_ended
from snapshotd.system import mounts
from snapshotd.system.freezer import remove_group
from snapshotd.system.memory_limit import remove_memory_group

log = structlog.get_logger(__name__)

SHIM_READY_TIMEOUT = 30.0


class ShimPool:
    """The Hosts port: starts shims, keeps one spare, finds those of an earlier daemon."""

    def __init__(
        self,
        directory: Path,
        criu: Path,
        pycriu: Path | None,
        weights: Path | None = None,
        memory_bytes: int = 0,
        engines: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            directory: where the shims' sockets lie; private to root.
            criu: the CRIU binary.
            pycriu: directory that holds the package pycriu; None if it is on Python's path.
            weights: the node's weight cache, mounted before the first shim starts; None if it has none.
            memory_bytes: memory that one model host may take; 0 for no limit.
            engines: the environments of the node's engines by name.
        """
        self.directory = directory
        self.criu = criu
        self.pycriu = pycriu
        self.weights = weights
        self.memory_bytes = memory_bytes
        self.engines = engines
        self._spare: asyncio.Task[ShimHost] | None = None
        self._hosts: set[ShimHost] = set()
        self._ends: set[asyncio.Task[None]] = set()

    async def take(self) -> ShimHost:
        spare, self._spare = self._spare, None
        host: ShimHost | None = None
        if spare is not None:
            with contextlib.suppress(DumontError):
                host = await spare
        if host is not None and host.lost.is_set():
            # The spare was killed while it waited. Its files are removed.
            with contextlib.suppress(DumontError):
                await host.release()
            host = None
        if host is None:
            host = await self._start()
        self.prepare()
        self._hosts = {known for known in self._hosts if known.connected} | {host}
        return host

    def prepare(self) -> None:
        """Start a spare shim, unless there is one."""
        if self._spare is None:
            self._spare = asyncio.create_task(self._start(), name="spare-shim")

    async def find(self) -> list[ShimHost]:
        paths = sorted(self.directory.glob("*.sock"))
        found = [host for host in await asyncio.gather(*map(self._find, paths)) if host is not None]
        self._hosts |= set(found)
        await self._clear({host.shim for host in found})
        return found

    async def _clear(self, living: AbstractSet[str]) -> None:
        """Remove the files of shims that are not ``living``, some of which ended before they had a socket."""
        for path in list(self.directory.iterdir()):
            shim = path.name.removeprefix(".").partition(".")[0]
            if shim not in living:
                await forget(self.directory / f"{shim}.sock")

    async def _find(self, path: Path) -> ShimHost | None:
        try:
            host = await ShimHost.connect(path)
        except OSError:
            # No shim listens here any more. Its mounts have ended with it.
            await forget(path)
            return None
        try:
            if await host.adopt():
                return host
            await host.release()
        except DumontError as error:
            log.error("silent_shim_ended", shim=host.shim, reason=error.reason)
            host.kill()
            await host.disconnect()
            await forget(path)
        return None

    async def end_orphans(self, instances: Path) -> None:
        held = {host.instance for host in self._hosts}
        homes = {mounts.identity(path) for path in instances.iterdir() if path.name not in held}
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        await asyncio.gather(*(_end_orphan(pid, homes) for pid in pids if _home(pid) in homes))

    def mounts(self) -> set[str]:
        own = {mounts.INSTANCE_MOUNT, mounts.MEMORY_MOUNT}
        if self.weights is not None:
            own.add(mounts.WEIGHTS_MOUNT)
        return {*mounts.node_mounts(), *own, *map(mounts.engine_mount, self.engines)}

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
        for name, place in self.engines.items():
            command += ["--engine", f"{name}={place}"]
        if self.memory_bytes:
            command += ["--memory", str(self.memory_bytes)]
        process = _spawn(command, path.with_suffix(".log"))
        ended = asyncio.create_task(_wait(process), name=f"{shim}-ended")
        # A reference, because the event loop alone does not keep a task alive.
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
            # Also if the caller is cancelled, because then nobody would know of the shim.
            process.kill()
            await forget(path, keep_log=isinstance(error, DumontError))
            if isinstance(error, TimeoutError):
                raise Internal(
                    "SHIM_FAILED", f"the shim was not ready within {SHIM_READY_TIMEOUT:g} s"
                ) from None
            raise


def _spawn(command: Sequence[str], complaints: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that what ends the daemon does not end the models."""
    with complaints.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line[:500] for line in reversed(lines) if line.strip()), "it said nothing")


def _home(pid: int) -> tuple[int, int]:
    """The identity of the directory that a process has mounted where a model host has its instance's."""
    return mounts.identity(Path(f"/proc/{pid}/root{mounts.INSTANCE_MOUNT}"))


async def _end_orphan(pid: int, homes: AbstractSet[tuple[int, int]]) -> None:
    """End a model host whose directory is one of these, and remove the cgroup that its shim has made."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Checked again, now that the pid cannot be reused.
        if _home(pid) in homes:
            shim = Path(f"/proc/{pid}/cgroup").read_text().rpartition("/")[2].strip()
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            await until_ended(descriptor)
            log.warning("model_host_without_shim_ended", pid=pid, shim=shim)
            if shim.startswith("shim-"):
                remove_group(shim)
                remove_memory_group(shim)
    except (ProcessLookupError, FileNotFoundError):
        # The process has ended by itself.
        pass
    finally:
        os.close(descriptor)


async def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a child without a thread, so that it leaves no zombie."""
    descriptor = os.pidfd_open(process.pid)
    try:
        await until_ended(descriptor)
        process.wait()
    finally:
        os.close(descriptor)

"""The processes: an object store, a controller and nodes, each started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from snapshotd.model import State
from snapshotd.system import linux
from tests.helpers.s3_server import BUCKET, S3Ports, server_command
from tests.nemesis.plan import ANY, UPLOADING

RESTART_SECONDS = 0.2
REAP_SECONDS = 0.05
# A park is over in a few milliseconds.
POLL_SECONDS = 0.003
# systemd's default is longer.
STOP_SECONDS = 60.0


@dataclass
class Service:
    """A process that is started again when it ends, as systemd would."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    pid: int = 0
    starts: int = 0
    wanted: bool = True
    # Of the last end that was wanted.
    status: int | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.pid = process.pid
        self.starts += 1
        # The reaper waits for it.
        process.returncode = 0


@dataclass
class Node:
    """One snapshotd and where its things are."""

    name: str
    service: Service
    state_dir: Path

    def phases(self) -> set[str]:
        """The states of its instances, as its journal has them, and whether it uploads."""
        found = set()
        for path in (self.state_dir / "journal").glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.add(State(json.loads(path.read_text())["state"]).name.lower())
        if any((self.state_dir / "uploads").glob("*")):
            found.add(UPLOADING)
        return found


@dataclass
class Fleet:
    """All of it below one directory, on ports of its own.

    Attributes:
        shims: every shim there was, by the name of its socket.
    """

    root: Path
    weed: Path
    models: Path
    free_port: Callable[[], int]
    node_names: Sequence[str] = ("a", "b")
    services: dict[str, Service] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    shims: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.controller = f"127.0.0.1:{self.free_port()}"
        self.store_ports = S3Ports.pick(self.free_port)
        self._reaper: asyncio.Task[None] | None = None
        self._restarts: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start everything; returns once the processes run."""
        # What any of them leaves behind becomes a child of this process, and is found.
        linux.become_subreaper()
        for folder in ("store", "controller", "tmp", "logs"):
            (self.root / folder).mkdir()
        (self.root / "trusted").touch()
        command, environment = server_command(self.weed, self.root / "store", self.store_ports)
        self._add("store", command, environment)
        everywhere = {
            **os.environ,
            "TMPDIR": str(self.root / "tmp"),
            "S3_ENDPOINT": self.store_ports.endpoint,
            "S3_ACCESS_KEY": self.store_ports.access_key,
            "S3_SECRET_KEY": self.store_ports.secret_key,
            # As on a machine: no coverage, no byte code beside the sources.
            "PYTHONUNBUFFERED": "1",
        }
        self._add(
            "controller",
            (
                sys.executable, "-m", "controller.main", "--listen", self.controller,
                "--state-dir", str(self.root / "controller"), "--heartbeat-seconds", "0.5",
                "--drain-seconds", "2",
            ),
            everywhere,
        )  # fmt: skip
        for name in self.node_names:
            state_dir = self.root / f"node-{name}"
            service = self._add(
                name,
                (
                    sys.executable, "-m", "snapshotd.main", "--listen", f"127.0.0.1:{self.free_port()}",
                    "--node-id", name, "--state-dir", str(state_dir), "--controller", self.controller,
                    "--heartbeat-seconds", "0.5", "--drain-seconds", "2", "--models-dir", str(self.models),
                    "--store-url", f"s3://{BUCKET}/nemesis", "--store-grace-seconds", "0",
                    "--trusted-keys-file", str(self.root / "trusted"), "--device", "cpu",
                ),
                everywhere,
            )  # fmt: skip
            self.nodes.append(Node(name, service, state_dir))
        self._reaper = asyncio.create_task(self._reap())

    def _add(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Service:
        service = Service(name, command, environment, self.root / "logs" / f"{name}.log")
        self.services[name] = service
        service.start()
        return service

    def trust(self) -> None:
        """Let every node restore what any of them captured."""
        keys = [(node.state_dir / "signing.pub").read_text() for node in self.nodes]
        (self.root / "trusted").write_text("".join(keys))

    async def _reap(self) -> None:
        """Wait for whatever ends, as init does, and start the services among it again."""
        while True:
            for pid, status in _reaped():
                self._ended(pid, status)
            for node in self.nodes:
                self.shims |= {path.stem for path in (node.state_dir / "shims").glob("shim-*.sock")}
            await asyncio.sleep(REAP_SECONDS)

    def _ended(self, pid: int, status: int) -> None:
        for service in self.services.values():
            if service.pid == pid:
                service.pid = 0
                service.status = os.waitstatus_to_exitcode(status)
                if service.wanted:
                    task = asyncio.create_task(self._restart(service))
                    self._restarts.add(task)
                    task.add_done_callback(self._restarts.discard)

    async def _restart(self, service: Service) -> None:
        await asyncio.sleep(RESTART_SECONDS)
        if service.wanted and not service.pid:
            service.start()

    # Victims

    def find(self, victims: Sequence[str], phase: str) -> dict[str, int] | None:
        """The pid to hit for each kind, all on one node that is in this phase; None: there is none now."""
        for node in self.nodes:
            if phase != ANY and phase not in node.phases():
                continue
            found = {victim: self._pid(node, victim) for victim in victims}
            if all(found.values()):
                return found
        return None

    def _pid(self, node: Node, victim: str) -> int:
        if victim in self.services:
            return self.services[victim].pid
        if victim == "snapshotd":
            return node.service.pid
        for process in self._of_node(node):
            # One that has just ended is none.
            with contextlib.suppress(psutil.Error):
                if self._kind(process) == victim:
                    return process.pid
        return 0

    def _of_node(self, node: Node) -> Iterator[psutil.Process]:
        """The processes that work for a node, its daemon aside: its shims and what they have started."""
        for process in descendants():
            with contextlib.suppress(psutil.Error):
                for ancestor in (process, *process.parents()):
                    if any(
                        argument.startswith(f"{node.state_dir}/shims/") for argument in ancestor.cmdline()
                    ):
                        yield process
                        break

    @staticmethod
    def _kind(process: psutil.Process) -> str:
        words = process.cmdline()
        if "snapshotd.shim.main" in words:
            living = any("model_host" in child.cmdline() for child in process.children())
            return "shim" if living else "spare"
        if "model_host" in words:
            return "host"
        if "swrk" in words:
            return "criu"
        if any(word.endswith(".page_server") for word in words):
            return "page_server"
        return ""

    # The end

    async def terminate(self, but: str) -> dict[str, int | None]:
        """Ask the services to end, all but one; their exit statuses, None for one that did not in time."""
        statuses: dict[str, int | None] = {}
        for service in reversed(self.services.values()):
            if service.name == but:
                continue
            service.wanted = False
            if service.pid:
                os.kill(service.pid, signal.SIGTERM)
            ended = await until(lambda service=service: not service.pid, STOP_SECONDS)  # type: ignore[misc]
            statuses[service.name] = service.status if ended else None
        return statuses

    async def close(self) -> None:
        """End whatever still runs, whoever left it."""
        for service in self.services.values():
            service.wanted = False
        for process in descendants():
            with contextlib.suppress(psutil.Error):
                process.kill()
        await until(lambda: not descendants(), 10.0)
        if self._reaper is not None:
            self._reaper.cancel()


def _reaped() -> Iterator[tuple[int, int]]:
    """Pid and wait status of each child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def descendants() -> list[psutil.Process]:
    """Every process that this one, or anything that it started, has started."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


async def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` came true within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True

"""Run both services on this machine as child processes, for development and demos: ``dumont up``."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import grpc

from dumont.client import AsyncClient
from dumont.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, services_not_installed
from dumont.rpc.channel import open_channel

START_SECONDS: Final = 60.0
# Longer than the services give running calls, plus time to end the models.
STOP_SECONDS: Final = 60.0
DRAIN_SECONDS: Final = 5
RECONNECT_SECONDS: Final = 0.1
PR_SET_PDEATHSIG: Final = 1
EXCERPT: Final = 500


@dataclass(frozen=True)
class Daemon:
    """A service to run: its module, the address it will answer on, and the file for its log."""

    name: str
    module: str
    endpoint: str
    log: Path
    arguments: tuple[str, ...]


def plan(
    state_dir: Path,
    controller_port: int,
    snapshotd_port: int,
    models_dir: Path | None = None,
    device: str = "auto",
) -> tuple[Daemon, Daemon]:
    """The controller and snapshotd with built-in defaults and all of their state below ``state_dir``."""
    controller = f"127.0.0.1:{controller_port}"
    snapshotd = f"127.0.0.1:{snapshotd_port}"
    models = ("--models-dir", str(models_dir.absolute())) if models_dir else ()
    return (
        Daemon(
            "controller", "controller.main", controller, state_dir / "controller.log",
            (
                "--listen", controller,
                "--state-dir", str(state_dir / "controller"),
                "--drain-seconds", str(DRAIN_SECONDS),
            ),
        ),
        Daemon(
            "snapshotd", "snapshotd.main", snapshotd, state_dir / "snapshotd.log",
            (
                "--listen", snapshotd,
                "--state-dir", str(state_dir / "snapshotd"),
                "--controller", controller,
                # The node is this controller's whatever has become of the controller's state directory.
                "--accept-controller",
                "--device", device,
                "--drain-seconds", str(DRAIN_SECONDS),
                "--stop-instances-on-exit",
                *models,
            ),
        ),
    )  # fmt: skip


def check_models_dir(directory: Path) -> None:
    """Raise unless the directory exists.

    Raises:
        InvalidArgument: MODELS_DIR_MISSING.
    """
    if not directory.is_dir():
        raise InvalidArgument(
            "MODELS_DIR_MISSING",
            f"there is no directory {directory.absolute()} for --models-dir; make it, or name another one",
            field="models_dir",
            metadata={"directory": str(directory.absolute())},
        )


def check_installed() -> None:
    """Raise if only the client is installed.

    Raises:
        FailedPrecondition: SERVICES_NOT_INSTALLED.
    """
    missing = [
        name for name in ("controller", "snapshotd", "grpc_health", "structlog") if not find_spec(name)
    ]
    if missing:
        raise services_not_installed(*missing)


async def run(daemons: Sequence[Daemon], ready: Callable[[], None], *, verbose: bool = False) -> None:
    """Start the services and run until SIGTERM or SIGINT, or until one of them ends; then stop them all.

    Args:
        daemons: as from ``plan``.
        ready: called once when all of them serve.
        verbose: their logs go to standard error instead of into files.

    Raises:
        FailedPrecondition: an address is taken, STATE_UNUSABLE, or a service ended.
        DeadlineExceeded: a service did not serve in time.
    """
    from dumont.rpc.server import check_free

    for daemon in daemons:
        check_free(daemon.endpoint)
    for daemon in daemons:
        _check_log(daemon.log)
    processes: list[asyncio.subprocess.Process] = []
    with _signals(processes) as stopped:
        tasks: list[asyncio.Task[Any]] = []
        try:
            began = datetime.now(UTC)
            for daemon in daemons:
                # One by one, so that when a start fails the earlier ones are known and are ended.
                processes.append(await _start(daemon, verbose))  # noqa: PERF401
            ends = [asyncio.create_task(end) for end in (stopped.wait(), *(p.wait() for p in processes))]
            # Not before: a process with gRPC's threads must not fork.
            serving = asyncio.create_task(_serving(daemons, began))
            tasks += (serving, *ends)
            await asyncio.wait({serving, *ends}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            _check(daemons, processes, stopped, verbose)
            if stopped.is_set():
                return
            if not serving.done():
                raise DeadlineExceeded(
                    "START_TIMEOUT",
                    f"the services did not serve within {START_SECONDS:.0f} seconds; see their logs",
                )
            serving.result()
            ready()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            _check(daemons, processes, stopped, verbose)
        finally:
            for task in tasks:
                task.cancel()
            await _stop(processes)


def _check_log(log: Path) -> None:
    """Raise early, with the directory named, if a log cannot be written."""
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("ab"):
            pass
    except OSError as error:
        raise FailedPrecondition(
            "STATE_UNUSABLE",
            f"the state directory {log.parent} cannot be used: {error.strerror or error}; "
            "choose another --state-dir, or make it writable",
            metadata={"directory": str(log.parent)},
        ) from error


async def _start(daemon: Daemon, verbose: bool) -> asyncio.subprocess.Process:
    with contextlib.ExitStack() as stack:
        output = None if verbose else stack.enter_context(daemon.log.open("ab"))
        # A session of its own: Ctrl-C at the terminal is forwarded once, not delivered a second time.
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", daemon.module, *daemon.arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip


_LIBC: Final = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Runs in the child before the service does: have it end if this process is killed."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _signals(processes: Sequence[asyncio.subprocess.Process]) -> Iterator[asyncio.Event]:
    """The event that the first signal sets; further signals are passed on, and end the services at once."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        if stopped.is_set():
            _terminate(processes)
        stopped.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, signalled)
    try:
        yield stopped
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _serving(daemons: Sequence[Daemon], since: datetime) -> None:
    """Wait until each service reports that it serves, and a node heard after ``since`` is ready."""
    await asyncio.gather(*(_healthy(daemon.endpoint) for daemon in daemons))
    async with AsyncClient(daemons[0].endpoint) as client:
        while True:
            for node in await client.nodes.list():
                # A node that the controller is still asking what it holds is not ready yet.
                if node.state == "ready" and node.heartbeat_time and node.heartbeat_time >= since:
                    return
            await asyncio.sleep(RECONNECT_SECONDS)


async def _healthy(endpoint: str) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with open_channel(endpoint, reconnect_seconds=RECONNECT_SECONDS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            with contextlib.suppress(grpc.RpcError):
                async for response in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            await asyncio.sleep(RECONNECT_SECONDS)


def _check(
    daemons: Sequence[Daemon],
    processes: Sequence[asyncio.subprocess.Process],
    stopped: asyncio.Event,
    verbose: bool,
) -> None:
    for daemon, process in zip(daemons, processes, strict=True):
        if process.returncode is None or stopped.is_set():
            continue
        where = "" if verbose else f"; its log {daemon.log} ends: {_last_line(daemon.log)}"
        raise FailedPrecondition(
            "SERVICE_ENDED",
            f"{daemon.name} ended with status {process.returncode}{where}",
            metadata={"service": daemon.name, "status": str(process.returncode)},
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").rstrip().splitlines()
    return lines[-1][:EXCERPT] if lines else "empty"


def _terminate(processes: Sequence[asyncio.subprocess.Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.terminate()


async def _stop(processes: Sequence[asyncio.subprocess.Process]) -> None:
    """End what still runs: with SIGTERM, and with SIGKILL if that takes too long."""
    _terminate(processes)
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await asyncio.gather(*(process.wait() for process in processes))
    except TimeoutError:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()

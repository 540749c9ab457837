"""How a ``grpc.aio`` server runs: its limits, where it listens, what every server serves, how it ends."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import os
import signal
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dumont.errors import FailedPrecondition, InvalidArgument
from dumont.limits import MESSAGE_BYTES
from dumont.rpc.errors import ErrorInterceptor
from dumont.rpc.reflection import add_reflection
from dumont.rpc.streams import WRITE_SECONDS

log = structlog.get_logger(__name__)

UNIX_PATH_LIMIT: Final = 107  # bytes in sockaddr_un, less the final zero
EXIT_INTERRUPTED: Final = 130


@dataclass(frozen=True)
class ServerLimits:
    """The limits beyond which a server refuses a caller.

    Args:
        max_message_bytes: the largest message taken or sent.
        max_concurrent_streams: calls at once on one connection.
        min_ping_seconds: pings closer together than this are strikes.
        max_ping_strikes: strikes before the connection is closed.
        keepalive_seconds: an idle connection is probed this often,
        keepalive_timeout_seconds: and closed when it does not answer for this long.
        write_seconds: a call whose caller does not read its stream for this long is ended.
    """

    max_message_bytes: int = MESSAGE_BYTES
    max_concurrent_streams: int = 1000
    min_ping_seconds: float = 10
    max_ping_strikes: int = 2
    keepalive_seconds: float = 60
    keepalive_timeout_seconds: float = 20
    write_seconds: float = WRITE_SECONDS

    def options(self) -> list[tuple[str, int]]:
        """The limits as gRPC channel arguments."""
        return [
            # Otherwise a second daemon could bind the same port and silently take a share of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_concurrent_streams),
            ("grpc.http2.min_ping_interval_without_data_ms", round(self.min_ping_seconds * 1000)),
            ("grpc.http2.max_ping_strikes", self.max_ping_strikes),
            ("grpc.keepalive_time_ms", round(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout_seconds * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
        ]


DEFAULT_LIMITS: Final = ServerLimits()


def new_server(
    domain: str,
    limits: ServerLimits = DEFAULT_LIMITS,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> grpc.aio.Server:
    """A server whose handlers may raise a ``DumontError``.

    Args:
        domain: names this service in the errors its callers receive.
        limits: callers are refused beyond these.
        interceptors: run inside the error interceptor, so that they may raise as well.
    """
    return grpc.aio.server(
        interceptors=[ErrorInterceptor(domain, limits.write_seconds), *interceptors], options=limits.options()
    )


def bind(server: grpc.aio.Server, address: str, *, insecure_ok: bool = False) -> str:
    """Listen in plain text on ``host:port`` or ``unix:path``.

    Args:
        server: not started yet.
        address: port 0 takes a free one; a Unix socket is made readable by its owner only.
        insecure_ok: also on addresses that other machines reach.

    Returns:
        The address to connect to.

    Raises:
        InvalidArgument: INVALID_ADDRESS.
        FailedPrecondition: ADDRESS_IN_USE, ADDRESS_UNUSABLE or PLAINTEXT_REFUSED.
    """
    if address.startswith("unix:"):
        return _bind_unix(server, address)
    host, port = _parse(address)
    if not (insecure_ok or _is_loopback(host)):
        raise FailedPrecondition(
            "PLAINTEXT_REFUSED",
            f"{address} can be reached from other machines and would be served in plain text; "
            "listen on 127.0.0.1 or a Unix socket, or allow it explicitly",
            metadata={"address": address},
        )
    check_free(address)
    target = f"[{host}]" if ":" in host else host
    bound = _add_port(server, f"{target}:{port}")
    return f"{target}:{bound}"


def check_free(address: str) -> None:
    """Raise early if nobody can listen on an address, where gRPC would only print to standard error.

    Raises:
        InvalidArgument: INVALID_ADDRESS.
        FailedPrecondition: ADDRESS_IN_USE or ADDRESS_UNUSABLE.
    """
    host, port = _parse(address)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        raise _unusable(address, error) from error


class Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The health of each service and of the server as a whole (``""``): not serving until ``set_all``."""

    def __init__(self, services: Iterable[str]) -> None:
        super().__init__()
        # Set when the server begins to drain; streams without an end of their own watch it.
        self.draining = asyncio.Event()
        self.services = ("", *services)
        # Nobody watches before the server starts, so the statuses may be set without an event loop.
        self._server_status.update(
            dict.fromkeys(self.services, health_pb2.HealthCheckResponse.ServingStatus.NOT_SERVING)
        )

    async def set_all(self, serving: bool) -> None:
        """Report every service as serving or not."""
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        for service in self.services:
            await self.set(service, statuses.SERVING if serving else statuses.NOT_SERVING)


def add_standard_services(server: grpc.aio.Server, service_full_names: Sequence[str]) -> Health:
    """Serve ``grpc.health.v1`` and reflection for these services.

    Args:
        server: not started yet.
        service_full_names: as in the proto, ``"dumont.controller.v1.NodeService"``; with
            ``google.longrunning.Operations`` where it is served.

    Returns:
        The health of them all, not serving yet.
    """
    servicer = Health(service_full_names)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    add_reflection((*service_full_names, health.SERVICE_NAME), server)
    return servicer


async def run_until_signalled(
    server: grpc.aio.Server, health: Health, grace_seconds: float, stop: asyncio.Event | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then refuse new calls and let the running ones end.

    A second signal ends the process at once, also while the caller cleans up after this returns.

    Args:
        server: started.
        health: told that nothing is served any more, before calls are refused.
        grace_seconds: after this long, calls still running are cancelled.
        stop: ends the run instead of signals, which are then left to the caller.
    """
    if stop is None:
        stop = asyncio.Event()
        with_signals = stop
        loop = asyncio.get_running_loop()

        def signalled(name: str) -> None:
            if with_signals.is_set():
                os._exit(EXIT_INTERRUPTED)
            log.info("draining", signal=name, grace_seconds=grace_seconds)
            with_signals.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signalled, number.name)
    _keep_what_there_is()
    await stop.wait()
    health.draining.set()
    await health.enter_graceful_shutdown()
    await server.stop(grace_seconds)


def _keep_what_there_is() -> None:
    """Take what was imported and built until now out of the garbage collector's sight.

    There are 140,000 such objects, and each pass over all of them stops every stream for a tenth of a second.
    """
    gc.collect()
    gc.freeze()


def remaining(context: grpc.aio.ServicerContext[Any, Any], margin: float = 0.05) -> float | None:
    """Seconds that a handler may give to the calls it makes; None if its caller set no deadline.

    Args:
        context: of the call being served.
        margin: seconds kept back, so that the answer still reaches the caller in time.
    """
    left = context.time_remaining()
    return None if left is None else max(0.0, left - margin)


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(
            "INVALID_ADDRESS",
            f"an address looks like 127.0.0.1:7070, [::1]:7070 or unix:/path; got {address[:120]!r}",
            field="address",
            metadata={"address": address[:120]},
        )
    # "localhost" is two addresses; a server whose port is taken on one of them would bind the other alone.
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind_unix(server: grpc.aio.Server, address: str) -> str:
    path = Path(address.removeprefix("unix:"))
    if not path.name or len(os.fsencode(path)) > UNIX_PATH_LIMIT:
        raise InvalidArgument(
            "INVALID_ADDRESS",
            f"a Unix socket's path has 1 to {UNIX_PATH_LIMIT} bytes; got {address[:200]!r}",
            field="address",
            metadata={"address": address[:200]},
        )
    # gRPC removes any socket at the path, so check first that nobody answers there.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            pass
        except OSError as error:
            raise _unusable(address, error) from error
        else:
            raise _in_use(address)
    if not path.parent.is_dir():
        raise _unusable(address, FileNotFoundError(2, "no such directory", str(path.parent)))
    # Set before the socket exists: until a later chmod, others could connect.
    previous = os.umask(0o177)
    try:
        _add_port(server, f"unix:{path}")
    finally:
        os.umask(previous)
    return f"unix:{path}"


def _add_port(server: grpc.aio.Server, address: str) -> int:
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:  # the address was taken after the probe
        raise _in_use(address) from error


def _in_use(address: str) -> FailedPrecondition:
    return FailedPrecondition(
        "ADDRESS_IN_USE",
        f"another process listens on {address}; stop it or choose another address",
        metadata={"address": address},
    )


def _unusable(address: str, error: OSError) -> FailedPrecondition:
    if error.errno == errno.EADDRINUSE:
        return _in_use(address)
    return FailedPrecondition(
        "ADDRESS_UNUSABLE",
        f"cannot listen on {address}: {error.strerror or error}",
        metadata={"address": address},
    )

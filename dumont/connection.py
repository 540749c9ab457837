"""The client's connection to one controller: its channel, its stubs, and errors that a caller can act on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc
from google.longrunning import operations_pb2_grpc

from dumont.controller.v1 import (
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    inference_service_pb2_grpc,
    instance_service_pb2,
    instance_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    snapshot_service_pb2,
    snapshot_service_pb2_grpc,
)
from dumont.errors import DeadlineExceeded, DumontError, FailedPrecondition, InvalidArgument, Unavailable
from dumont.rpc.channel import open_channel
from dumont.rpc.status import from_rpc_error, is_from_service

DEFAULT_ENDPOINT: Final = "localhost:7070"
UNIX_PATH_LIMIT: Final = 107  # bytes in sockaddr_un, less the final zero
_MODULES: Final = (deployment_service_pb2, instance_service_pb2, node_service_pb2, snapshot_service_pb2)
_SERVICES: Final = [service for module in _MODULES for service in module.DESCRIPTOR.services_by_name.values()]

# In gRPC's words when no connection came about, rather than when one was lost; the last are of names.
_NOT_CONNECTED: Final = ("failed to connect", "resolving", "resolution", "lookup")
# Schemes of gRPC's own addresses; any other is somebody's URL.
_ADDRESS_SCHEMES: Final = ("dns:", "ipv4:", "ipv6:", "xds:")


def resolve_endpoint(endpoint: str | None) -> str:
    """The given endpoint, else ``DUMONT_ENDPOINT``, else the default port of this machine.

    Controllers that share a database are named together, ``a:7070,b:7070``: the first that answers is used,
    and the next one when it is gone.

    Raises:
        InvalidArgument: INVALID_ENDPOINT, it is neither ``host:port``, several of them, nor ``unix:path``.
    """
    found = endpoint or os.environ.get("DUMONT_ENDPOINT") or DEFAULT_ENDPOINT
    if not isinstance(found, str):
        raise _invalid(found, "it is not a string")
    if "," in found and not found.startswith((*_ADDRESS_SCHEMES, "unix:")):
        several = [part.strip() for part in found.split(",") if part.strip()]
        if not several:
            raise _invalid(found, "it names none")
        return ",".join(map(_single, several))
    return _single(found)


def _single(found: str) -> str:
    if found.startswith("unix:"):
        path = found.removeprefix("unix:")
        if not path.strip("/"):
            raise _invalid(found, "it lacks the socket's path, as in unix:/run/dumont/controller.sock")
        if len(os.fsencode(path)) > UNIX_PATH_LIMIT:
            raise _invalid(found, f"a socket's path has at most {UNIX_PATH_LIMIT} bytes; use a shorter one")
        return found
    if found.startswith(_ADDRESS_SCHEMES):
        return found
    if "://" in found:
        scheme, _, rest = found.partition("://")
        raise _invalid(
            found, f"it is a URL; leave out {scheme}://, as in {_with_port(rest.partition('/')[0])}"
        )
    host, colon, port = found.rpartition(":")
    if not colon or found.endswith("]"):
        raise _invalid(found, f"it lacks a port, as in {_with_port(found)}")
    if not host:
        raise _invalid(found, f"it lacks a host, as in localhost:{port}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise _invalid(found, f"an IPv6 address stands in brackets, as in [{host}]:{port}")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise _invalid(found, f"{port!r} is not a port from 1 to 65535")
    return found


def _with_port(host: str) -> str:
    return host if ":" in host.rpartition("]")[2] else f"{host or 'localhost'}:7070"


def _invalid(endpoint: object, why: str) -> InvalidArgument:
    shown = str(endpoint)[:120]
    return InvalidArgument(
        "INVALID_ENDPOINT",
        f"an endpoint is host:port or unix:/path, and {shown!r} is not one: {why}",
        field="endpoint",
        metadata={"endpoint": shown},
    )


class _Process:
    """Which process gRPC runs in: its threads do not come along when that process forks."""

    opened_in: int | None = None


def check_not_forked() -> None:
    """Raise in a process that was forked after its parent's first call, where gRPC would wait for ever.

    Raises:
        FailedPrecondition: FORKED_AFTER_USE.
    """
    if _Process.opened_in not in (None, os.getpid()):
        raise FailedPrecondition(
            "FORKED_AFTER_USE",
            f"this process was forked from process {_Process.opened_in}, which had used Dumont already, and "
            "gRPC does not work after such a fork; make the first call after the fork (a client may be made "
            "before it), or start processes with multiprocessing's method 'spawn' or 'forkserver'",
            metadata={"parent": str(_Process.opened_in)},
        )


class _Stubs:
    """A channel and its stubs."""

    def __init__(self, endpoint: str) -> None:
        self.channel = open_channel(endpoint, _SERVICES)
        self.deployments = deployment_service_pb2_grpc.DeploymentServiceStub(self.channel)
        self.inference = inference_service_pb2_grpc.InferenceServiceStub(self.channel)
        self.instances = instance_service_pb2_grpc.InstanceServiceStub(self.channel)
        self.snapshots = snapshot_service_pb2_grpc.SnapshotServiceStub(self.channel)
        self.nodes = node_service_pb2_grpc.NodeServiceStub(self.channel)
        self.operations: Any = operations_pb2_grpc.OperationsStub(self.channel)


class Connection:
    """The stubs of one controller. It connects at the first call, within the event loop that makes it.

    Until then nothing of gRPC runs, so a connection may be made before a fork and used after it.

    Raises:
        InvalidArgument: INVALID_ENDPOINT.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = resolve_endpoint(endpoint)
        self._stubs: _Stubs | None = None
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.endpoint,)

    def _open(self) -> _Stubs:
        check_not_forked()
        if self._closed:
            raise FailedPrecondition(
                "CLIENT_CLOSED",
                f"the client of {self.endpoint} was closed, by close() or at the end of its `with` block; "
                "call it before that, or make another client",
                metadata={"endpoint": self.endpoint},
            )
        if self._stubs is None:
            _Process.opened_in = os.getpid()
            self._stubs = _Stubs(self.endpoint)
        return self._stubs

    @property
    def deployments(self) -> deployment_service_pb2_grpc.DeploymentServiceAsyncStub:
        """The stub of ``DeploymentService``; so are the others named."""
        return self._open().deployments

    @property
    def inference(self) -> inference_service_pb2_grpc.InferenceServiceAsyncStub:
        """See ``deployments``."""
        return self._open().inference

    @property
    def instances(self) -> instance_service_pb2_grpc.InstanceServiceAsyncStub:
        """See ``deployments``."""
        return self._open().instances

    @property
    def snapshots(self) -> snapshot_service_pb2_grpc.SnapshotServiceAsyncStub:
        """See ``deployments``."""
        return self._open().snapshots

    @property
    def nodes(self) -> node_service_pb2_grpc.NodeServiceAsyncStub:
        """See ``deployments``."""
        return self._open().nodes

    @property
    def operations(self) -> Any:
        """See ``deployments``."""
        return self._open().operations

    async def close(self) -> None:
        """End running calls and disconnect."""
        self._closed = True
        # In a forked process there is nothing of its own to end.
        if self._stubs is not None and _Process.opened_in == os.getpid():
            await self._stubs.channel.close()

    @contextmanager
    def errors(self, timeout: float | None = None) -> Iterator[None]:
        """Turn the error of a call into the ``DumontError`` that it carries.

        Args:
            timeout: the call's own, in seconds, if it has one.
        """
        try:
            yield
        except grpc.RpcError as raised:
            error = from_rpc_error(raised)
            if not is_from_service(raised):
                error = self._own_words(error, timeout)
            raise error from raised

    def _own_words(self, error: DumontError, timeout: float | None) -> DumontError:
        """What to say of an error that no service of Dumont has explained."""
        facts = {"endpoint": self.endpoint, "cause": error.message}
        if isinstance(error, Unavailable):
            if any(words in error.message for words in _NOT_CONNECTED):
                return Unavailable(
                    "ENDPOINT_UNREACHABLE",
                    f"no controller answers at {self.endpoint}; start one with `dumont up`, "
                    "or name another one in DUMONT_ENDPOINT",
                    metadata=facts,
                )
            return Unavailable(
                "CONNECTION_LOST",
                f"the connection to {self.endpoint} was lost before the call ended ({error.message}); the "
                "controller may have ended, or what listens there is not one",
                metadata=facts,
            )
        if isinstance(error, DeadlineExceeded):
            within = f"within {timeout:g} s, the timeout of the call" if timeout is not None else "in time"
            return DeadlineExceeded(
                "DEADLINE_EXCEEDED",
                f"{self.endpoint} did not answer {within}; allow more, as a start of the model counts too",
                metadata=facts,
            )
        if error.reason == grpc.StatusCode.UNIMPLEMENTED.name:
            return FailedPrecondition(
                "NOT_A_CONTROLLER",
                f"what answers at {self.endpoint} lacks this method: it is another service, such as a node's "
                "snapshotd (7071 by default, a controller has 7070), or a controller older than this client",
                metadata=facts,
            )
        return error

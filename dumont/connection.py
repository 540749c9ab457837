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
from dumont.errors import Unavailable
from dumont.rpc.channel import open_channel
from dumont.rpc.status import from_rpc_error

DEFAULT_ENDPOINT: Final = "localhost:7070"
_MODULES: Final = (deployment_service_pb2, instance_service_pb2, node_service_pb2, snapshot_service_pb2)
_SERVICES: Final = [service for module in _MODULES for service in module.DESCRIPTOR.services_by_name.values()]


def resolve_endpoint(endpoint: str | None) -> str:
    """The given endpoint, else ``DUMONT_ENDPOINT``, else the default port of this machine."""
    return endpoint or os.environ.get("DUMONT_ENDPOINT") or DEFAULT_ENDPOINT


class Connection:
    """The stubs of one controller. Made within the event loop that uses them; connects at the first call."""

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = resolve_endpoint(endpoint)
        self._channel = open_channel(self.endpoint, _SERVICES)
        self.deployments = deployment_service_pb2_grpc.DeploymentServiceStub(self._channel)
        self.inference = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self.instances = instance_service_pb2_grpc.InstanceServiceStub(self._channel)
        self.snapshots = snapshot_service_pb2_grpc.SnapshotServiceStub(self._channel)
        self.nodes = node_service_pb2_grpc.NodeServiceStub(self._channel)
        self.operations: Any = operations_pb2_grpc.OperationsStub(self._channel)

    async def close(self) -> None:
        """End running calls and disconnect."""
        await self._channel.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the error of a call into the ``DumontError`` that it carries."""
        try:
            yield
        except grpc.RpcError as raised:
            error = from_rpc_error(raised)
            if isinstance(error, Unavailable) and error.reason == Unavailable.code:
                error = Unavailable(
                    "ENDPOINT_UNREACHABLE",
                    f"no controller answers at {self.endpoint}; start one with `dumont up`, "
                    "or name another one in DUMONT_ENDPOINT",
                    metadata={"endpoint": self.endpoint, "cause": error.message},
                )
            raise error from raised

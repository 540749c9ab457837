"""``dumont.snapshotd.v1.InferenceService``: bytes in, bytes out, to and from the instance's model host.

A token frame is never decoded here; a request is read once, to find its instance, and passed on as it came.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from dumont import names
from dumont.errors import DumontError, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from dumont.rpc.server import remaining
from dumont.rpc.status import from_rpc_error
from dumont.rpc.streams import WRITE_SECONDS, PatientWriter
from dumont.snapshotd.v1 import inference_service_pb2 as pb2
from snapshotd.instances.manager import Instances
from snapshotd.model import Instance, State

Context = grpc.aio.ServicerContext[Any, Any]

BytesStream = grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
BytesUnary = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

Request = TypeVar("Request", pb2.GenerateRequest, pb2.EmbedRequest)

SERVICE = "dumont.snapshotd.v1.InferenceService"
HOST_SERVICE = "dumont.model_host.v1.ModelHostService"
SOCKET_NAME = "host.sock"
# What gRPC itself answers, without a reason, when a model host has more calls than it has threads for.
HOST_BUSY = "Concurrent RPC limit exceeded!"


@dataclass
class _Connection:
    """A connection to one model host process."""

    pid: int
    directory: int
    channel: grpc.aio.Channel


class Inference:
    """Finds the model host of a request and keeps a channel to each."""

    def __init__(self, instances: Instances) -> None:
        self.instances = instances
        self._connections: dict[str, _Connection] = {}

    def handler(self) -> grpc.GenericRpcHandler:
        """Handlers without serializers, in place of the generated ones."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(self.generate),
                "Embed": grpc.unary_unary_rpc_method_handler(self.embed),
            },
        )

    async def generate(self, request: bytes, context: Context) -> None:
        """Pass frame after frame; no generator is in between, because each costs time for every token."""
        channel = await self._channel(_parse(pb2.GenerateRequest(), request).name)
        method: BytesStream = channel.unary_stream(f"/{HOST_SERVICE}/Generate")
        call = method(request, timeout=remaining(context))
        read, writer = call.read, PatientWriter(context, WRITE_SECONDS, call.cancel)
        write = writer.write
        try:
            with writer:
                while (frame := await read()) is not grpc.aio.EOF:
                    await write(frame)
        except grpc.aio.AioRpcError as error:
            raise told(error) from error
        finally:
            # However the caller's stream ended: the model host must not compute for nobody.
            call.cancel()

    async def embed(self, request: bytes, context: Context) -> bytes:
        channel = await self._channel(_parse(pb2.EmbedRequest(), request).name)
        try:
            method: BytesUnary = channel.unary_unary(f"/{HOST_SERVICE}/Embed")
            return await method(request, timeout=remaining(context))
        except grpc.aio.AioRpcError as error:
            raise told(error) from error

    async def close(self) -> None:
        for instance in list(self._connections):
            await self._drop(instance)

    async def _channel(self, name: str) -> grpc.aio.Channel:
        instance = self.instances.get(names.parse(name, "instances", "name"))
        self._must_serve(instance)
        connection = self._connections.get(instance.id)
        if connection is None or connection.pid != instance.pid:
            await self._drop(instance.id)
            connection = self._connections[instance.id] = _connect(
                instance, self.instances.node.instance_directory(instance.id)
            )
            await self._drop_gone()
        return connection.channel

    async def _drop_gone(self) -> None:
        alive = {instance.id for instance in self.instances.all()}
        for instance in set(self._connections) - alive:
            await self._drop(instance)

    async def _drop(self, instance: str) -> None:
        connection = self._connections.pop(instance, None)
        if connection is not None:
            await connection.channel.close()
            with contextlib.suppress(OSError):
                os.close(connection.directory)

    def _must_serve(self, instance: Instance) -> None:
        if instance.state is State.SERVING:
            return
        details = {"instance": instance.id, "state": instance.state.name}
        if instance.state in (State.STARTING, State.RESTORING, State.CAPTURING, State.RESUMING):
            raise Unavailable(
                "INSTANCE_NOT_READY",
                f"instances/{instance.id} is {instance.state.name}; try again when it serves",
                metadata=details,
                retry_after=0.2,
            )
        raise FailedPrecondition(
            "INSTANCE_NOT_SERVING", f"instances/{instance.id} is {instance.state.name}", metadata=details
        )


def told(error: grpc.aio.AioRpcError) -> DumontError:
    """What a model host says, also where gRPC answers in its place."""
    if error.details() == HOST_BUSY:
        return ResourceExhausted(
            "QUEUE_FULL", "the instance takes no more calls at present; try again", retry_after=0.2
        )
    return from_rpc_error(error)


def _parse(message: Request, data: bytes) -> Request:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidArgument("MALFORMED_REQUEST", "the request is not a valid protobuf message") from error
    return message


def _connect(instance: Instance, directory: Path) -> _Connection:
    # By descriptor: a socket's path may have 107 bytes, and a state directory may be deep.
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    target = f"unix:/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    return _Connection(instance.pid, descriptor, grpc.aio.insecure_channel(target, options=options))

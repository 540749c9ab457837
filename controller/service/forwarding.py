"""Any controller answers any request: one about a deployment is answered by the controller that holds it.

The holder alone knows which requests wait and run, so it alone queues, starts, parks and captures. The others
pass what they receive on to it, as bytes. If the holder dies before the answer has begun, a request for
inference waits for whoever takes its place; anything else is refused with a status that allows another try,
because nobody knows what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias, cast

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from controller.assembly import Controller
from controller.membership import Membership
from controller.ports import Members
from dumont.controller.v1 import (
    deployment_service_pb2,
    inference_service_pb2,
    instance_service_pb2,
    snapshot_service_pb2,
)
from dumont.errors import InvalidArgument, NotFound, Unavailable
from dumont.rpc import operations
from dumont.rpc.server import remaining
from dumont.rpc.status import from_rpc_error, is_from_service
from dumont.rpc.streams import WRITE_SECONDS, PatientWriter

log = structlog.get_logger()

INFERENCE: Final = "dumont.controller.v1.InferenceService"
# Every controller knows what these tell, or may do what they ask for.
ANYWHERE: Final = frozenset(
    {
        "/dumont.controller.v1.DeploymentService/CreateDeployment",
        "/dumont.controller.v1.DeploymentService/ListDeployments",
        "/dumont.controller.v1.InstanceService/GetInstance",
        "/dumont.controller.v1.InstanceService/ListInstances",
        "/dumont.controller.v1.InstanceService/WatchInstances",
        "/dumont.controller.v1.InstanceService/StreamInstanceLogs",
        "/dumont.controller.v1.SnapshotService/GetSnapshot",
        "/dumont.controller.v1.SnapshotService/ListSnapshots",
        "/dumont.controller.v1.SnapshotService/PruneSnapshots",
        f"/{operations.SERVICE_NAME}/ListOperations",
    }
)
# These show what others may have made just now.
LISTS: Final = frozenset(method for method in ANYWHERE if "/List" in method and "Operations" not in method)
SERVICES: Final = tuple(
    service
    for module in (
        deployment_service_pb2,
        inference_service_pb2,
        instance_service_pb2,
        snapshot_service_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
)
# What the field "name" of a request names, by the file of its service.
COLLECTIONS: Final = {
    deployment_service_pb2.DESCRIPTOR.name: "deployments",
    instance_service_pb2.DESCRIPTOR.name: "instances",
    snapshot_service_pb2.DESCRIPTOR.name: "snapshots",
}
# Says that a controller has passed the call on, so that it is not passed on in a circle.
FORWARDED: Final = "dumont-forwarded"
# How often the holder is looked for again while nobody is it.
AGAIN_SECONDS: Final = 0.2
OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class _HolderLost(Exception):
    """The controller that was asked is gone, and nothing of its answer has arrived."""


class Peers:
    """Connections to the other controllers, by address."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def channel(self, address: str) -> grpc.aio.Channel:
        """The connection to one."""
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=OPTIONS)
        return self._channels[address]

    async def keep(self, members: Members) -> None:
        """Drop the connections to those that are gone."""
        gone = set(self._channels) - set(members.addresses.values())
        # All at once: another call may drop them, too, while one is being closed.
        for channel in [self._channels.pop(address) for address in gone]:
            await channel.close()

    async def close(self) -> None:
        """Drop all."""
        await self.keep(Members())


class ForwardingInterceptor(grpc.aio.ServerInterceptor):
    """Passes calls on to the controller that answers them. Until ``attach`` there is only this one.

    Args:
        patience: seconds that a call about a deployment waits while nobody holds it.
        write_seconds: how long a frame may wait for its reader.
    """

    def __init__(self, patience: float, write_seconds: float = WRITE_SECONDS) -> None:
        self._patience = patience
        self._write_seconds = write_seconds
        self._peers = Peers()
        self._inputs = {
            f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
            for service in SERVICES
            for method in service.methods
        }
        self._controller: Controller | None = None

    def attach(self, controller: Controller) -> None:
        """From now on, other controllers may hold deployments."""
        self._controller = controller

    async def close(self) -> None:
        """Disconnect from the other controllers."""
        await self._peers.close()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        controller = self._controller
        if handler is None or controller is None:
            return cast("Handler", handler)
        if method in LISTS and len(controller.core.membership.members.addresses) > 1:
            # Without the database, what was known last is better than nothing.
            with contextlib.suppress(Unavailable):
                await controller.succession.refresh()
        is_operation = method.startswith(f"/{operations.SERVICE_NAME}/")
        if method in ANYWHERE or not (is_operation or method in self._inputs):
            return cast("Handler", handler)
        forwarded = any(key == FORWARDED for key, _ in handler_call_details.invocation_metadata or ())
        call = _Call(controller, self._peers, method, handler, self._inputs.get(method), forwarded)
        call.until = asyncio.get_running_loop().time() + self._patience
        call.write_seconds = self._write_seconds
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(call.stream)
        return grpc.unary_unary_rpc_method_handler(call.unary, response_serializer=call.serialize)


class _Call:
    """One call, until it has found who answers it."""

    def __init__(
        self,
        controller: Controller,
        peers: Peers,
        method: str,
        handler: Any,
        request: type[Message] | None,
        forwarded: bool,
    ) -> None:
        self._controller = controller
        self._membership: Membership = controller.core.membership
        self._peers = peers
        self._method = method
        self._handler = handler
        # None: the call is about an operation.
        self._request: Any = request
        self._forwarded = forwarded
        self._repeatable = method.startswith(f"/{INFERENCE}/") or "/Get" in method or "/Wait" in method
        # When to give up looking for the holder.
        self.until = 0.0
        self.write_seconds = WRITE_SECONDS

    # The two kinds of handler

    async def unary(self, data: bytes, context: Context) -> Any:
        while (holder := await self._holder(data, context)) is not None:
            try:
                return await self._ask(holder, data, context)
            except _HolderLost as lost:
                await self._again(holder, lost)
        return await self._handler.unary_unary(self._decoded(data), context)

    async def stream(self, data: bytes, context: Context) -> None:
        while (holder := await self._holder(data, context)) is not None:
            try:
                await self._pass_on(holder, data, context)
                return
            except _HolderLost as lost:
                await self._again(holder, lost)
        await self._handler.unary_stream(self._decoded(data), context)

    def serialize(self, answer: Any) -> bytes:
        """An answer of this controller is a message; one that was passed on is encoded already."""
        if isinstance(answer, bytes):
            return answer
        encoded: bytes = self._handler.response_serializer(answer)
        return encoded

    def _decoded(self, data: bytes) -> Any:
        decode = self._handler.request_deserializer
        try:
            return data if decode is None else decode(data)
        except DecodeError as error:
            raise InvalidArgument(
                "MALFORMED_REQUEST", "the request is not a valid protobuf message of this method"
            ) from error

    # Who answers

    async def _holder(self, data: bytes, context: Context) -> int | None:
        """The session of the controller to ask; None: this one answers."""
        if self._request is None:
            return await self._runner(operations.operation_name(self._decoded(data).name))
        try:
            deployment = self._deployment(self._request.FromString(data))
        except DecodeError:
            return None
        if deployment and self._membership.holder(deployment) is None:
            # Another controller may have made it just now.
            await self._refresh()
        while True:
            holder = self._membership.holder(deployment)
            if not deployment or holder in (None, self._membership.number):
                return None
            if self._forwarded:
                raise Unavailable(
                    "NOT_THE_HOLDER",
                    f"deployments/{deployment} has another holder by now; try again",
                    metadata={"deployment": f"deployments/{deployment}"},
                    retry_after=AGAIN_SECONDS,
                )
            if holder in self._membership.members.addresses:
                return holder
            if self._late():
                raise Unavailable(
                    "HOLDER_LOST",
                    f"the controller that held deployments/{deployment} is gone, and none has taken its "
                    "place yet; try again",
                    metadata={"deployment": f"deployments/{deployment}"},
                    retry_after=1.0,
                )
            await self._refresh()
            if self._membership.holder(deployment) not in self._membership.members.addresses:
                await asyncio.sleep(AGAIN_SECONDS)

    def _late(self) -> bool:
        return asyncio.get_running_loop().time() > self.until

    async def _refresh(self) -> None:
        if len(self._membership.members.addresses) > 1 or self._membership.members.highest > 1:
            await self._controller.succession.refresh()
        await self._peers.keep(self._membership.members)

    async def _runner(self, operation: str) -> int | None:
        """The session that runs an operation; None: this one, or one that has ended."""
        stored = await self._controller.core.registry.operation(operation)
        if stored is None or stored.done or self._forwarded or stored.session == self._membership.number:
            return None
        if stored.session not in self._membership.members.addresses:
            await self._refresh()
        return stored.session if stored.session in self._membership.members.addresses else None

    def _deployment(self, request: Message) -> str:
        """The deployment that a request is about; empty: nobody knows."""
        inventory = self._controller.core.inventory
        for name in names_in(request):
            kind, _, identifier = name.partition("/")
            if kind == "deployments":
                return identifier
            if kind == "instances" and identifier in inventory.instances:
                return inventory.instances[identifier].deployment
            if kind == "snapshots":
                try:
                    return inventory.snapshot(identifier).deployment
                except NotFound:
                    return ""
        return ""

    # Asking another controller

    async def _ask(self, holder: int, data: bytes, context: Context) -> bytes:
        ask: Any = self._channel(holder).unary_unary(self._method)
        call = ask(data, timeout=remaining(context), metadata=((FORWARDED, "1"),))
        async with self._asking(holder, call):
            answer: bytes = await call
            return answer

    async def _pass_on(self, holder: int, data: bytes, context: Context) -> None:
        ask: Any = self._channel(holder).unary_stream(self._method)
        call = ask(data, timeout=remaining(context), metadata=((FORWARDED, "1"),))
        began = False
        with PatientWriter(context, self.write_seconds, call.cancel) as writer:
            try:
                async with self._asking(holder, call):
                    while (frame := await call.read()) is not grpc.aio.EOF:
                        began = True
                        await writer.write(frame)
            except _HolderLost as lost:
                if began:
                    raise _lost(holder) from lost
                raise

    def _channel(self, holder: int) -> grpc.aio.Channel:
        return self._peers.channel(self._membership.members.addresses[holder])

    @asynccontextmanager
    async def _asking(self, holder: int, call: Any) -> AsyncIterator[None]:
        """Turn the errors of a call to another controller into ours, and end it when that one is replaced."""
        ended = asyncio.ensure_future(self._membership.until_ended(holder))
        ended.add_done_callback(lambda done: None if done.cancelled() else call.cancel())
        try:
            yield
        except grpc.aio.AioRpcError as error:
            translated = from_rpc_error(error)
            silent = isinstance(translated, Unavailable) and not is_from_service(error)
            if silent or translated.reason == "NOT_THE_HOLDER":
                raise _HolderLost(translated.message) from error
            raise translated from error
        except asyncio.CancelledError:
            if ended.done() and not ended.cancelled():
                raise _HolderLost("its session has ended") from None
            raise
        finally:
            ended.cancel()
            call.cancel()

    async def _again(self, holder: int, lost: _HolderLost) -> None:
        """Return when the call may be made again. Raises: Unavailable, it must not be."""
        log.info("holder_lost", method=self._method, session=holder, why=str(lost))
        if not self._repeatable or self._late():
            raise _lost(holder) from lost
        await asyncio.sleep(AGAIN_SECONDS)
        await self._refresh()


def names_in(request: Message) -> list[str]:
    """The resource names that say what a request is about, the most telling first.

    A caller may give an id alone; which collection it is of, the field says.
    """
    found = []
    own = COLLECTIONS.get(request.DESCRIPTOR.file.name, "")
    for field, collection in (
        ("deployment", "deployments"),
        ("name", own),
        ("instance", "instances"),
        ("snapshot", "snapshots"),
    ):
        if field in request.DESCRIPTOR.fields_by_name:
            value = getattr(request, field)
            name = value if isinstance(value, str) else value.name
            if name:
                found.append(name if "/" in name else f"{collection}/{name}")
    return found


def _lost(holder: int) -> Unavailable:
    return Unavailable(
        "HOLDER_LOST",
        "the controller that answered is gone, and nobody knows what became of the call; try again",
        metadata={"session": str(holder)},
        retry_after=1.0,
    )

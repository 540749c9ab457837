"""``dumont.snapshotd.v1.InferenceService``: bytes in, bytes out, to and from the instance's model host.

A token frame is never decoded here; a request is read once, to find its instance, and passed on as it came.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from dumont import names
from dumont.errors import DumontError, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from dumont.model_host.v1 import model_host_service_pb2 as host_pb2
from dumont.rpc.server import remaining
from dumont.rpc.status import from_rpc_error, from_status, is_from_service
from dumont.rpc.streams import WRITE_SECONDS, PatientWriter
from dumont.snapshotd.v1 import inference_service_pb2 as pb2
from snapshotd.instances.manager import Instances
from snapshotd.model import Instance, State

Context = grpc.aio.ServicerContext[Any, Any]

BytesUnary = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

Request = TypeVar("Request", pb2.GenerateRequest, pb2.EmbedRequest)

SERVICE = "dumont.snapshotd.v1.InferenceService"
HOST_SERVICE = "dumont.model_host.v1.ModelHostService"
SOCKET_NAME = "host.sock"
GONE = "INSTANCE_GONE"
# The answer of gRPC itself, without a reason, if a model host has more calls than threads.
HOST_BUSY = "Concurrent RPC limit exceeded!"
# The shim needs a moment to tell how a model host ended whose connection broke.
END_SECONDS = 1.0


class _Call:
    """One call of an exchange.

    Args:
        leave: says that the call is over, and whether the model host knows.
    """

    def __init__(self, leave: Callable[..., None]) -> None:
        self.frames: asyncio.Queue[Any] = asyncio.Queue()
        self._leave = leave
        self._last = False
        self._left = False

    async def read(self) -> Sequence[bytes] | None:
        """The next messages of the answer; None after its last.

        Raises:
            DumontError: the model host has refused the call, or has ended.
        """
        if self._last:
            return None
        frame = await self.frames.get()
        if isinstance(frame, BaseException):
            self._last = True
            raise frame
        self._last = frame.last
        if frame.status:
            raise from_status(Status.FromString(frame.status))
        return frame.messages  # type: ignore[no-any-return]

    def cancel(self) -> None:
        """Tell the model host to stop computing for this call."""
        if not self._left:
            self._left = True
            self._leave(ended=self._last)


class _Exchange:
    """The stream that carries all calls to one model host. If it breaks, they all fail.

    Args:
        channel: to the model host.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        method = channel.stream_stream(
            f"/{HOST_SERVICE}/Exchange",
            request_serializer=host_pb2.ExchangeRequest.SerializeToString,
            response_deserializer=host_pb2.ExchangeResponse.FromString,
        )
        self._stream: grpc.aio.StreamStreamCall[Any, Any] = method()
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        # Orders and cancels under way.
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self._broken: BaseException | None = None
        self._reading = asyncio.create_task(self._read())

    @property
    def broken(self) -> bool:
        """Whether the stream carries no more calls."""
        return self._broken is not None

    async def begin(self, request: bytes, timeout: float | None) -> _Call:
        """Make a call.

        Args:
            timeout: seconds after which the caller gives up; None for never.

        Raises:
            Unavailable: INSTANCE_GONE.
        """
        number = next(self._numbers)
        call = self._calls[number] = _Call(partial(self._leave, number))
        try:
            order = host_pb2.ExchangeRequest(call=number, generate=request, timeout=timeout or 0)
            # gRPC ends a stream in which a write is cancelled, and this one carries the calls of others.
            await asyncio.shield(self._spawn(self._order(order)))
        except BaseException:
            # The request may have been sent before its caller was cancelled.
            self._leave(number, ended=False)
            raise
        return call

    def _leave(self, number: int, *, ended: bool) -> None:
        self._calls.pop(number, None)
        if not ended and not self.broken:
            self._spawn(self._cancel(number))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _cancel(self, number: int) -> None:
        with contextlib.suppress(DumontError):
            await self._order(host_pb2.ExchangeRequest(call=number, cancel=True))

    async def close(self) -> None:
        self._stream.cancel()
        await asyncio.wait([self._reading])

    async def _order(self, order: host_pb2.ExchangeRequest) -> None:
        async with self._writing:
            if self._broken is not None:
                raise self._broken
            try:
                await self._stream.write(order)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                raise self._failure(error) from error

    async def _read(self) -> None:
        failure: BaseException
        try:
            response: Any
            while (response := await self._stream.read()) is not grpc.aio.EOF:
                for frame in response.frames:
                    if (call := self._calls.get(frame.call)) is not None:
                        call.frames.put_nowait(frame)
            failure = self._failure(None)
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            failure = self._failure(error)
        self._broken = failure
        for call in self._calls.values():
            call.frames.put_nowait(failure)

    def _failure(self, error: BaseException | None) -> DumontError:
        if isinstance(error, grpc.aio.AioRpcError) and error.code() is not grpc.StatusCode.CANCELLED:
            return told(error)
        return _gone()


@dataclass
class _Connection:
    """A connection to one model host process."""

    pid: int
    directory: int
    channel: grpc.aio.Channel
    exchange: _Exchange | None = None

    def stream(self) -> _Exchange:
        """The stream for calls, which is opened when it is first needed, and again after it has broken."""
        if self.exchange is None or self.exchange.broken:
            self.exchange = _Exchange(self.channel)
        return self.exchange

    async def close(self) -> None:
        if self.exchange is not None:
            await self.exchange.close()
        await self.channel.close()
        with contextlib.suppress(OSError):
            os.close(self.directory)


class Inference:
    """Finds the model host of each request, and keeps a channel to each model host."""

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
        """Pass on each message. There is no generator in between, which would cost time for every token."""
        name = _parse(pb2.GenerateRequest(), request).name
        connection = await self._connection(name)
        try:
            call = await connection.stream().begin(request, remaining(context))
            writer = PatientWriter(context, WRITE_SECONDS, call.cancel)
            write = writer.write
            try:
                with writer:
                    while (messages := await call.read()) is not None:
                        for message in messages:
                            await write(message)
            finally:
                # However the caller's stream has ended, the model host must not go on computing.
                call.cancel()
        except Unavailable as error:
            raise await self._explained(name, error) from error

    async def embed(self, request: bytes, context: Context) -> bytes:
        name = _parse(pb2.EmbedRequest(), request).name
        channel = (await self._connection(name)).channel
        try:
            method: BytesUnary = channel.unary_unary(f"/{HOST_SERVICE}/Embed")
            return await method(request, timeout=remaining(context))
        except grpc.aio.AioRpcError as error:
            raise await self._explained(name, told(error)) from error

    async def _explained(self, name: str, error: DumontError) -> DumontError:
        """How the instance ended, if a call failed because of that; else ``error`` as it is."""
        if error.reason != GONE:
            return error
        ended = await self._ended(names.parse(name, "instances", "name"))
        if ended is None:
            return error
        return Unavailable(
            GONE,
            f"{name} ended while it answered: {ended.failure_message}; the next request starts another",
            metadata={"instance": name, "cause": ended.failure_reason},
            retry_after=error.retry_after,
        )

    async def _ended(self, instance: str) -> Instance | None:
        """The instance once it is known to have failed; None if it is in another state."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS), self.instances.changes() as changes:
                while True:
                    found = (await changes.get()).instance
                    if found is None or found.id != instance or found.state is State.SERVING:
                        continue
                    return found if found.state is State.FAILED else None
        return None

    async def close(self) -> None:
        for instance in list(self._connections):
            await self._drop(instance)

    async def _connection(self, name: str) -> _Connection:
        instance = self.instances.get(names.parse(name, "instances", "name"))
        self._must_serve(instance)
        connection = self._connections.get(instance.id)
        if connection is None or connection.pid != instance.pid:
            # In its place before anything is awaited: another request must find it, not make a second.
            stale, connection = (
                connection,
                _connect(instance, self.instances.node.instance_directory(instance.id)),
            )
            self._connections[instance.id] = connection
            if stale is not None:
                await stale.close()
            await self._drop_gone()
        return connection

    async def _drop_gone(self) -> None:
        alive = {instance.id for instance in self.instances.all()}
        for instance in set(self._connections) - alive:
            await self._drop(instance)

    async def _drop(self, instance: str) -> None:
        connection = self._connections.pop(instance, None)
        if connection is not None:
            await connection.close()

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
    """The error of a model host, or of gRPC in its place."""
    if error.details() == HOST_BUSY:
        return ResourceExhausted(
            "QUEUE_FULL", "the instance takes no more calls at present; try again", retry_after=0.2
        )
    # Only a connection that breaks has no details: a model host gives some for each of its errors.
    if error.code() is grpc.StatusCode.UNAVAILABLE and not is_from_service(error):
        return _gone()
    return from_rpc_error(error)


def _gone() -> DumontError:
    return Unavailable(GONE, "the model host ended or was taken out of service", retry_after=0.2)


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

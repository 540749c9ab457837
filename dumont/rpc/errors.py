"""The interceptor that lets a handler raise a ``DumontError`` and have its caller receive it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from dumont.errors import Aborted, DumontError, Internal, InvalidArgument
from dumont.rpc.status import to_status

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Decode = Callable[[Any], Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call with the status of the error its handler raised.

    A ``DumontError`` arrives as it is. Anything else is a defect: it is logged with its traceback and
    the caller learns only that. Works for all four kinds of handler, whatever their serializers.

    A handler that yields is closed as soon as its call ends, however it ends, so what it releases in
    ``finally`` is released then and not when the garbage collector comes by. It is closed, too, when its
    caller reads nothing for a while: without that a call with no deadline would hold for ever what it holds.

    Requests are decoded here instead of by gRPC, which answers UNKNOWN to one that is malformed.

    Args:
        domain: names this service in the errors.
        write_seconds: how long a message of a stream may wait for its reader.
    """

    def __init__(self, domain: str, write_seconds: float) -> None:
        self._domain = domain
        self._write_seconds = write_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        try:
            handler: Any = await continuation(handler_call_details)
        except DumontError as error:
            return self._refusal(error)
        if handler is None:  # no such method; gRPC answers UNIMPLEMENTED
            return handler
        method = handler_call_details.method
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        factory, attribute = _KINDS[handler.request_streaming, handler.response_streaming]
        decode = None if handler.request_streaming else handler.request_deserializer
        wrapped: grpc.RpcMethodHandler[Any, Any] = factory(
            wrap(method, getattr(handler, attribute), decode or _as_it_is),
            request_deserializer=handler.request_deserializer if handler.request_streaming else None,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _refusal(self, refused: DumontError) -> grpc.RpcMethodHandler[Any, Any]:
        """A handler for a call that an interceptor refused before anyone knew what kind of call it is."""

        async def refuse(request: Any, context: Context) -> None:
            await self._abort(context, refused)

        return grpc.unary_unary_rpc_method_handler(refuse)

    def _wrap_unary(self, method: str, behavior: Any, decode: Decode) -> Any:
        async def answer(request: Any, context: Context) -> Any:
            async with self._errors(method, context):
                return await behavior(_decoded(request, decode), context)

        return answer

    def _wrap_stream(self, method: str, behavior: Any, decode: Decode) -> Any:
        async def generate(request: Any, context: Context) -> None:
            async with self._errors(method, context):
                responses = behavior(_decoded(request, decode), context)
                async with _Reader(responses, self._write_seconds) as reader:
                    async for response in responses:
                        await reader.write(context, response)

        async def write(request: Any, context: Context) -> None:
            async with self._errors(method, context):
                await behavior(_decoded(request, decode), context)

        return generate if inspect.isasyncgenfunction(behavior) else write

    @asynccontextmanager
    async def _errors(self, method: str, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except DumontError as error:
            await self._abort(context, error)
        except Exception:
            log.exception("handler_failed", method=method)
            defect = Internal("INTERNAL", "the service failed to handle this call; the reason is in its log")
            await self._abort(context, defect)

    async def _abort(self, context: Context, error: DumontError) -> None:
        await context.abort_with_status(rpc_status.to_status(to_status(error, self._domain)))


class _Reader:
    """The one that a handler's messages go to. The handler is closed when its call ends, or is not read.

    gRPC takes no status while a message waits for its reader. So the handler is closed first, and the status
    follows when that message has gone, or never, should the caller go on not to read.

    Args:
        responses: the handler.
        patience: seconds that a message may wait.
    """

    def __init__(self, responses: AsyncGenerator[Any], patience: float) -> None:
        self._responses = responses
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._closing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _Reader:
        self._timer = self._loop.call_later(self._patience, self._look)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._closing is not None:
            await self._closing
        await self._responses.aclose()

    async def write(self, context: Context, response: Any) -> None:
        """Raises: Aborted, STREAM_NOT_READ."""
        self._since = self._loop.time()
        await context.write(response)
        self._since = None
        if self._closing is not None:
            raise Aborted(
                "STREAM_NOT_READ",
                f"nothing of the answer was read for {self._patience:g} s, so the call was ended; read an "
                "answer as it comes, or cancel the call",
                metadata={"seconds": f"{self._patience:g}"},
            )

    def _look(self) -> None:
        # Looked at now and then instead of timing each message: there may be thousands in a second.
        waited = 0.0 if self._since is None else self._loop.time() - self._since
        if waited >= self._patience:
            self._closing = self._loop.create_task(self._close())
        else:
            self._timer = self._loop.call_later(self._patience - waited, self._look)

    async def _close(self) -> None:
        await self._responses.aclose()


def _as_it_is(request: bytes) -> bytes:
    return request


def _decoded(request: Any, decode: Decode) -> Any:
    try:
        return decode(request)
    except DecodeError as error:
        raise InvalidArgument(
            "MALFORMED_REQUEST", "the request is not a valid protobuf message of this method"
        ) from error


_KINDS: dict[tuple[bool, bool], tuple[Callable[..., grpc.RpcMethodHandler[Any, Any]], str]] = {
    (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
    (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
    (True, True): (grpc.stream_stream_rpc_method_handler, "stream_stream"),
}

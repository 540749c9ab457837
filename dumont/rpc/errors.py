"""The interceptor that passes a ``DumontError`` of a handler to the caller."""

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

from dumont.errors import DumontError, Internal, InvalidArgument
from dumont.rpc.status import to_status
from dumont.rpc.streams import PatientWriter

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Decode = Callable[[Any], Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call with the status of the error that its handler raised.

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
        """Wrap the handler of a call."""
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
                closing: list[asyncio.Task[None]] = []
                writer = PatientWriter(
                    context,
                    self._write_seconds,
                    lambda: closing.append(asyncio.ensure_future(_close(responses))),
                )
                try:
                    with writer:
                        async for response in responses:
                            await writer.write(response)
                finally:
                    for task in closing:
                        await task
                    await responses.aclose()

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


async def _close(responses: AsyncGenerator[Any]) -> None:
    await responses.aclose()


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

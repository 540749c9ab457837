"""The interceptor that lets a handler raise a ``DumontError`` and have its caller receive it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import structlog
from grpc_status import rpc_status

from dumont.errors import DumontError, Internal
from dumont.rpc.status import to_status

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call with the status of the error its handler raised.

    A ``DumontError`` arrives as it is. Anything else is a defect: it is logged with its traceback and
    the caller learns only that. Works for all four kinds of handler, whatever their serializers.

    A handler that yields is closed as soon as its call ends, however it ends, so what it releases in
    ``finally`` is released then and not when the garbage collector comes by.

    Args:
        domain: names this service in the errors.
    """

    def __init__(self, domain: str) -> None:
        self._domain = domain

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method; gRPC answers UNIMPLEMENTED
            return handler
        method = handler_call_details.method
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        factory, attribute = _KINDS[handler.request_streaming, handler.response_streaming]
        wrapped: grpc.RpcMethodHandler[Any, Any] = factory(
            wrap(method, getattr(handler, attribute)),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _wrap_unary(self, method: str, behavior: Any) -> Any:
        async def answer(request: Any, context: Context) -> Any:
            async with self._errors(method, context):
                return await behavior(request, context)

        return answer

    def _wrap_stream(self, method: str, behavior: Any) -> Any:
        async def generate(request: Any, context: Context) -> None:
            async with self._errors(method, context), aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    await context.write(response)

        async def write(request: Any, context: Context) -> None:
            async with self._errors(method, context):
                await behavior(request, context)

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


_KINDS: dict[tuple[bool, bool], tuple[Callable[..., grpc.RpcMethodHandler[Any, Any]], str]] = {
    (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
    (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
    (True, True): (grpc.stream_stream_rpc_method_handler, "stream_stream"),
}

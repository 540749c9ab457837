"""What every server promises: errors arrive, limits hold, ports are not shared, cancellation is felt."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from dumont.errors import (
    DeadlineExceeded,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from dumont.rpc.operations import SERVICE_NAME as OPERATIONS
from dumont.rpc.server import (
    ServerLimits,
    add_standard_services,
    bind,
    new_server,
    remaining,
    run_until_signalled,
)
from dumont.rpc.status import from_rpc_error

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FULL = ResourceExhausted(
    "QUEUE_FULL", "16 calls wait already", metadata={"waiting": "16"}, field="prompt", retry_after=1.5
)


class Handlers:
    """Methods of a service ``test.Raw`` that passes bytes, as a token stream does."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.released = asyncio.Event()
        self.left: float | None = None

    async def unary(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.left = remaining(context)
        if request == b"defect":
            raise ZeroDivisionError("secret detail")
        if request == b"abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "as it is")
        if request == b"wait":
            await self._wait()
        if request != b"ok":
            raise FULL
        return request

    async def stream(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            if request == b"flood":
                self.entered.set()
                while True:
                    yield b"x" * 100_000
            if request == b"wait":
                await self._wait()
            raise FULL
        finally:
            self.released.set()

    async def written(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        try:
            await context.write(b"first")
            if request == b"flood":
                self.entered.set()
                while True:
                    await context.write(b"x" * 100_000)
            if request == b"wait":
                await self._wait()
            raise FULL
        finally:
            self.released.set()

    async def gather(self, requests: AsyncIterator[bytes], context: object) -> bytes:
        raise FULL

    async def echo(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
            raise FULL

    async def _wait(self) -> None:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.released.set()

    def generic(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "test.Raw",
            {
                "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
                "Stream": grpc.unary_stream_rpc_method_handler(self.stream),
                "Written": grpc.unary_stream_rpc_method_handler(self.written),
                "Gather": grpc.stream_unary_rpc_method_handler(self.gather),
                "Echo": grpc.stream_stream_rpc_method_handler(self.echo),
            },
        )


class Service:
    def __init__(self, handlers: Handlers, channel: grpc.aio.Channel, address: str) -> None:
        self.handlers = handlers
        # Raw bytes: its calls have no types.
        self.channel: Any = channel
        self.address = address

    def unary(self, request: bytes, timeout: float = 10) -> Any:
        return self.channel.unary_unary("/test.Raw/Unary")(request, timeout=timeout)

    def stream(self, request: bytes, method: str = "Stream") -> Any:
        return self.channel.unary_stream(f"/test.Raw/{method}")(request, timeout=10)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    handlers = Handlers()
    server = new_server("test.dumont", ServerLimits(max_message_bytes=200_000, write_seconds=0.5))
    server.add_generic_rpc_handlers((handlers.generic(),))
    add_standard_services(server, ["test.Raw"])
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Service(handlers, channel, address)
    await server.stop(0)


def assert_full(error: grpc.RpcError) -> None:
    received = from_rpc_error(error)
    assert isinstance(received, ResourceExhausted)
    assert (received.reason, received.message) == (FULL.reason, FULL.message)
    assert (received.metadata, received.field, received.retry_after) == ({"waiting": "16"}, "prompt", 1.5)


async def test_an_error_arrives_whole_from_a_unary_call(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.unary(b"")
    assert_full(raised.value)


async def test_an_error_on_the_wire_is_one_error_info_with_the_field_and_the_delay(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.unary(b"")
    status = rpc_status.from_call(raised.value)
    kinds = [detail.Is(ErrorInfo.DESCRIPTOR) for detail in status.details]
    info = ErrorInfo()
    assert kinds.count(True) == 1
    assert status.details[kinds.index(True)].Unpack(info)
    assert (info.domain, info.reason) == ("test.dumont", "QUEUE_FULL")
    assert [d.Is(BadRequest.DESCRIPTOR) for d in status.details].count(True) == 1
    assert [d.Is(RetryInfo.DESCRIPTOR) for d in status.details].count(True) == 1


@pytest.mark.parametrize("method", ["Stream", "Written"])
async def test_an_error_arrives_after_the_messages_before_it(service: Service, method: str) -> None:
    call = service.channel.unary_stream(f"/test.Raw/{method}")(b"", timeout=10)
    assert await call.read() == b"first"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert_full(raised.value)


async def one() -> AsyncIterator[bytes]:
    yield b"one"


async def test_an_error_arrives_where_the_caller_streams(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.channel.stream_unary("/test.Raw/Gather")(one(), timeout=10)
    assert_full(raised.value)


async def test_an_error_arrives_where_both_stream(service: Service) -> None:
    call = service.channel.stream_stream("/test.Raw/Echo")(one(), timeout=10)
    assert await call.read() == b"one"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert_full(raised.value)


def test_an_error_arrives_whole_at_a_synchronous_caller_too() -> None:
    async def serve(ready: Callable[[str], Any]) -> Any:
        server = new_server("test.dumont")
        server.add_generic_rpc_handlers((Handlers().generic(),))
        address = bind(server, "127.0.0.1:0")
        await server.start()
        try:
            return await asyncio.to_thread(ready, address)
        finally:
            await server.stop(0)

    def call(address: str) -> grpc.RpcError:
        with grpc.insecure_channel(address) as channel:
            unary: Any = channel.unary_unary("/test.Raw/Unary")
            with pytest.raises(grpc.RpcError) as raised:
                unary(b"", timeout=10)
        return raised.value

    assert_full(asyncio.run(serve(call)))


async def test_a_defect_is_told_without_its_details(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.unary(b"defect")
    error = from_rpc_error(raised.value)
    assert isinstance(error, Internal)
    assert error.reason == "INTERNAL"
    assert "secret" not in repr(raised.value)
    logged = capfd.readouterr()
    assert "ZeroDivisionError" in logged.out + logged.err
    assert "/test.Raw/Unary" in logged.out + logged.err


async def test_an_abort_of_the_handler_itself_passes(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.unary(b"abort")
    error = from_rpc_error(raised.value)
    assert isinstance(error, NotFound)
    assert (error.reason, error.message) == ("NOT_FOUND", "as it is")


async def test_an_answer_passes(service: Service) -> None:
    assert await service.unary(b"ok") == b"ok"


async def test_cancelling_a_call_reaches_the_handler(service: Service) -> None:
    call = service.unary(b"wait")
    await service.handlers.entered.wait()
    call.cancel()
    await asyncio.wait_for(service.handlers.released.wait(), 5)
    assert service.handlers.released.is_set()


@pytest.mark.parametrize("method", ["Stream", "Written"])
@pytest.mark.parametrize("at", ["wait", "flood"])
async def test_cancelling_a_stream_releases_the_handler_at_await_and_at_yield(
    service: Service, at: str, method: str
) -> None:
    call = service.stream(at.encode(), method)
    assert await call.read() == b"first"
    await service.handlers.entered.wait()
    call.cancel()
    await asyncio.wait_for(service.handlers.released.wait(), 5)
    assert service.handlers.released.is_set()


async def _read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_stream_that_nobody_reads_is_ended_and_its_handler_released(service: Service) -> None:
    # given: a caller without a deadline, which reads one answer of many
    call = service.channel.unary_stream("/test.Raw/Stream")(b"flood")
    assert await call.read() == b"first"
    await service.handlers.entered.wait()

    # then: what the handler holds is free after a while
    await asyncio.wait_for(service.handlers.released.wait(), 5)

    # and: when the caller reads on, it learns why that is all
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await _read_all(call)
    assert from_rpc_error(raised.value).reason == "STREAM_NOT_READ"


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_a_malformed_request_is_the_caller_s_fault(service: Service, method: str) -> None:
    kind = service.channel.unary_unary if method == "Check" else service.channel.unary_stream
    call: Any = kind(f"/grpc.health.v1.Health/{method}")(b"\xff\xff", timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (call if method == "Check" else call.read())
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(raised.value).reason == "MALFORMED_REQUEST"


async def test_a_passed_deadline_reaches_caller_and_handler(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.unary(b"wait", timeout=0.5)
    assert isinstance(from_rpc_error(raised.value), DeadlineExceeded)
    await asyncio.wait_for(service.handlers.released.wait(), 5)
    assert service.handlers.left is not None
    assert 0 <= service.handlers.left < 0.5


async def test_without_a_deadline_there_is_no_remaining_time(service: Service) -> None:
    await service.channel.unary_unary("/test.Raw/Unary")(b"ok")
    assert service.handlers.left is None


async def test_a_message_over_the_limit_is_refused_and_others_are_served(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.unary(b"x" * 200_001)
    assert isinstance(from_rpc_error(raised.value), ResourceExhausted)
    assert await service.unary(b"ok") == b"ok"


async def test_an_unknown_method_is_unimplemented(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.channel.unary_unary("/test.Raw/Other")(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert from_rpc_error(raised.value).reason == "UNIMPLEMENTED"


async def test_an_endpoint_nobody_serves_is_unavailable() -> None:
    async with grpc.aio.insecure_channel("unix:/nonexistent/dumont.sock") as channel:
        unary: Any = channel.unary_unary("/test.Raw/Unary")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unary(b"", timeout=10)
    error = from_rpc_error(raised.value)
    assert isinstance(error, Unavailable)
    assert error.reason == "UNAVAILABLE"


async def test_health_and_reflection_cover_each_service_and_draining_shows() -> None:
    # given a server with the standard services
    server = new_server("test.dumont")
    health = add_standard_services(server, ["dumont.controller.v1.NodeService", OPERATIONS])
    address = bind(server, "127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    running = asyncio.create_task(run_until_signalled(server, health, grace_seconds=60, stop=stop))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def statuses() -> set[int]:
            answers = [
                await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
                for name in ("", "dumont.controller.v1.NodeService", OPERATIONS)
            ]
            return {answer.status for answer in answers}

        # then it serves only once it says so
        assert await statuses() == {NOT_SERVING}
        # and the collector does not look any more at what was imported, which would stop every stream
        assert gc.get_freeze_count() > 10_000
        gc.unfreeze()
        await health.set_all(True)
        assert await statuses() == {SERVING}

        # and lists what it serves
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
        )
        async for response in listing:
            listed = {service.name for service in response.list_services_response.service}
        assert {"dumont.controller.v1.NodeService", OPERATIONS, "grpc.health.v1.Health"} <= listed

        # and a watcher learns that it drains
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=10)
        assert (await watch.read()).status == SERVING
        stop.set()
        assert (await watch.read()).status == NOT_SERVING
    await asyncio.wait_for(running, 10)


async def test_a_signal_drains_and_a_second_one_exits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a server with a call under way
    exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(os, "_exit", exited.set_result)
    server = new_server("test.dumont")
    handlers = Handlers()
    server.add_generic_rpc_handlers((handlers.generic(),))
    health = add_standard_services(server, [])
    address = bind(server, "127.0.0.1:0")
    await server.start()
    running = asyncio.create_task(run_until_signalled(server, health, grace_seconds=60))
    async with grpc.aio.insecure_channel(address) as channel:
        unary: Any = channel.unary_unary("/test.Raw/Unary")
        call = unary(b"wait", timeout=10)
        await handlers.entered.wait()
        await health.set_all(True)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert (await watch.read()).status == SERVING

        # when it is told to end, then the call is left its time
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        assert not running.done()
        assert not exited.done()

        # and told again, then it does not wait
        os.kill(os.getpid(), signal.SIGINT)
        assert await asyncio.wait_for(exited, 10) == 130

        call.cancel()
        watch.cancel()
        await asyncio.wait_for(running, 10)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)

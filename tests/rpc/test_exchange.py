"""Many callers of one model host share a stream, and none of them notices the others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from dumont.errors import ResourceExhausted, Unavailable
from dumont.inference.v1 import inference_pb2
from dumont.model_host.v1 import model_host_service_pb2 as host_pb2
from dumont.rpc.server import bind, new_server
from dumont.rpc.status import from_rpc_error, to_status
from dumont.snapshotd.v1 import inference_service_pb2 as pb2
from snapshotd.instances.record import Change
from snapshotd.model import Instance, State
from snapshotd.service.inference import HOST_SERVICE, SOCKET_NAME, Inference

Context = grpc.aio.ServicerContext[Any, Any]
FULL = ResourceExhausted("QUEUE_FULL", "no room", retry_after=0.5)


class Host:
    """A model host that says each word of a prompt; some words mean something else."""

    def __init__(self) -> None:
        self.streams = 0
        self.orders: list[host_pb2.ExchangeRequest] = []
        self.cancelled = asyncio.Event()
        self.hanging = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.killed = asyncio.Event()

    async def exchange(self, orders: AsyncIterator[bytes], context: Context) -> None:
        self.streams += 1
        async for data in orders:
            order = host_pb2.ExchangeRequest.FromString(data)
            self.orders.append(order)
            if order.cancel:
                self.cancelled.set()
                continue
            prompt = host_pb2.GenerateRequest.FromString(order.generate).prompt
            if prompt == "die":
                return
            if prompt == "be killed":
                chunk = inference_pb2.TextChunk(text="half an ")
                frame = host_pb2.ExchangeResponse.Frame(call=order.call)
                frame.messages.append(host_pb2.GenerateResponse(chunk=chunk).SerializeToString())
                await context.write(host_pb2.ExchangeResponse(frames=[frame]).SerializeToString())
                self.killed.set()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            if prompt == "hang":
                self.hanging.set()
                await self.reading.wait()
                continue
            frame = host_pb2.ExchangeResponse.Frame(call=order.call, last=True)
            if prompt == "full":
                frame.status = to_status(FULL, "model_host.dumont").SerializeToString()
            for word in prompt.split():
                chunk = inference_pb2.TextChunk(text=word)
                frame.messages.append(host_pb2.GenerateResponse(chunk=chunk).SerializeToString())
            await context.write(host_pb2.ExchangeResponse(frames=[frame]).SerializeToString())


class OneInstance:
    """The instances of a node that has one."""

    def __init__(self, directory: Path) -> None:
        self.node = self
        self._directory = directory
        self._changes: asyncio.Queue[Change] = asyncio.Queue()
        self.watched = asyncio.Event()
        self._instance = Instance(
            "one", "qa", "org/model", "causal_lm", State.SERVING, datetime.now(UTC), pid=42
        )

    def get(self, instance: str) -> Instance:
        return self._instance

    def all(self) -> list[Instance]:
        return [self._instance]

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[asyncio.Queue[Change]]:
        self._changes.put_nowait(Change(self._instance))
        self.watched.set()
        yield self._changes

    def fail(self, message: str) -> None:
        self._instance = replace(
            self._instance, state=State.FAILED, failure_reason="HOST_DIED", failure_message=message
        )
        self._changes.put_nowait(Change(self._instance))

    def instance_directory(self, instance: str) -> Path:
        return self._directory


class Served:
    def __init__(self, host: Host, inference: Inference, channel: grpc.aio.Channel) -> None:
        self.host = host
        self.inference = inference
        self._generate: Any = channel.unary_stream(
            "/dumont.snapshotd.v1.InferenceService/Generate",
            request_serializer=pb2.GenerateRequest.SerializeToString,
            response_deserializer=pb2.GenerateResponse.FromString,
        )

    def call(self, prompt: str, timeout: float | None = 20) -> Any:
        return self._generate(pb2.GenerateRequest(name="instances/one", prompt=prompt), timeout=timeout)

    async def words(self, prompt: str) -> list[str]:
        return [message.chunk.text async for message in self.call(prompt)]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    host = Host()
    behind = grpc.aio.server()
    handlers: Any = {"Exchange": grpc.stream_stream_rpc_method_handler(host.exchange)}
    behind.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HOST_SERVICE, handlers),))
    behind.add_insecure_port(f"unix:{tmp_path / SOCKET_NAME}")
    await behind.start()
    instances: Any = OneInstance(tmp_path)
    inference = Inference(instances)
    server = new_server("snapshotd.dumont")
    server.add_generic_rpc_handlers((inference.handler(),))
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Served(host, inference, channel)
    await server.stop(0)
    await inference.close()
    await behind.stop(0)


async def test_each_caller_gets_its_own_answer_over_one_stream(served: Served) -> None:
    prompts = [f"answer {number} of many" for number in range(50)]

    answers = await asyncio.gather(*map(served.words, prompts))

    assert answers == [prompt.split() for prompt in prompts]
    assert served.host.streams == 1


async def test_a_refusal_reaches_its_caller_alone(served: Served) -> None:
    refused, answered = await asyncio.gather(
        served.words("full"), served.words("one two"), return_exceptions=True
    )

    assert answered == ["one", "two"]
    assert isinstance(refused, grpc.aio.AioRpcError)
    error = from_rpc_error(refused)
    assert (type(error), error.reason, error.retry_after) == (ResourceExhausted, "QUEUE_FULL", 0.5)


async def test_one_who_leaves_ends_the_computing_for_it_and_for_nobody_else(served: Served) -> None:
    call = served.call("hang", timeout=None)
    await asyncio.wait_for(served.host.hanging.wait(), 10)

    call.cancel()
    await asyncio.wait_for(served.host.cancelled.wait(), 10)

    assert served.host.orders[-1].call == served.host.orders[0].call
    assert await served.words("still here") == ["still", "here"]
    assert served.host.streams == 1


async def test_one_who_leaves_while_its_order_is_written_ends_nothing_for_the_others(served: Served) -> None:
    # given: a host that reads nothing at present, with a call, and an order that it has no room for
    served.host.reading.clear()
    hanging = served.call("hang", timeout=None)
    await asyncio.wait_for(served.host.hanging.wait(), 10)
    large = pb2.GenerateRequest(name="instances/one", prompt="x" * 3_000_000).SerializeToString()
    context: Any = NobodysContext()
    leaving = asyncio.create_task(served.inference.generate(large, context))
    for _ in range(50):
        await asyncio.sleep(0)

    # when its caller leaves, and the host reads again
    leaving.cancel()
    await asyncio.wait([leaving])
    served.host.reading.set()

    # then the others have their stream,
    assert await served.words("still here") == ["still", "here"]
    assert served.host.streams == 1
    assert not hanging.done()
    # and the host is told to compute nothing for the one who left
    await asyncio.wait_for(served.host.cancelled.wait(), 10)


class NobodysContext:
    """Of a call without a deadline whose answer nobody looks at."""

    def time_remaining(self) -> None:
        return None

    async def write(self, message: bytes) -> None:
        pass


async def test_a_callers_deadline_travels_with_its_order(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await served.call("hang", timeout=0.5).read()

    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < served.host.orders[0].timeout <= 0.5
    await asyncio.wait_for(served.host.cancelled.wait(), 10)


async def test_a_stream_that_breaks_fails_its_calls_and_is_opened_anew(served: Served) -> None:
    hanging = served.call("hang")
    await asyncio.wait_for(served.host.hanging.wait(), 10)

    with pytest.raises(grpc.aio.AioRpcError):
        await served.words("die")
    with pytest.raises(grpc.aio.AioRpcError) as lost:
        await hanging.read()

    error = from_rpc_error(lost.value)
    assert (type(error), error.reason) == (Unavailable, "INSTANCE_GONE")
    assert await served.words("back again") == ["back", "again"]
    assert served.host.streams == 2


async def test_a_host_that_is_killed_in_an_answer_is_named_with_its_end(served: Served) -> None:
    # given an answer under way
    call = served.call("be killed")
    assert (await call.read()).chunk.text == "half an "
    await asyncio.wait_for(served.host.killed.wait(), 10)

    # when its host is killed, which its shim tells a moment later
    instances: Any = served.inference.instances
    await asyncio.wait_for(instances.watched.wait(), 10)
    instances.fail("its process ended by itself: ended by SIGKILL, and the last line of its log is: ready")
    with pytest.raises(grpc.aio.AioRpcError) as lost:
        await call.read()

    # then the caller is told which instance it was, and how it ended
    error = from_rpc_error(lost.value)
    assert (type(error), error.reason) == (Unavailable, "INSTANCE_GONE")
    assert "instances/one ended while it answered" in error.message
    assert "ended by SIGKILL, and the last line of its log is: ready" in error.message
    assert error.metadata == {"instance": "instances/one", "cause": "HOST_DIED"}


async def test_requests_at_once_to_a_process_that_took_anothers_place_share_a_connection(
    tmp_path: Path,
) -> None:
    # given a connection to the process that was there before
    instances: Any = OneInstance(tmp_path)
    inference = Inference(instances)
    before = await inference._connection("instances/one")
    instances._instance = replace(instances._instance, pid=43)

    # when two requests come at once for the one that is there now
    first, second = await asyncio.gather(
        inference._connection("instances/one"), inference._connection("instances/one")
    )

    # then they share one, and nothing of the old one is left open
    assert first is second is not before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(before.directory)
    await inference.close()

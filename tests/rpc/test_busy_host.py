"""What gRPC itself answers for a model host without a free thread reaches callers with reason and advice."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from snapshotd.service.inference import told


async def test_a_host_without_a_free_thread_is_full_for_the_moment() -> None:
    # given: a server like a model host's, whose only call is taken
    entered, leave = threading.Event(), threading.Event()

    def work(request: bytes, context: object) -> bytes:
        entered.set()
        leave.wait(10)
        return b""

    server = grpc.server(ThreadPoolExecutor(1), maximum_concurrent_rpcs=1)
    handlers: dict[str, Any] = {"Work": grpc.unary_unary_rpc_method_handler(work)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Host", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        first = asyncio.ensure_future(_call(channel))
        await asyncio.to_thread(entered.wait, 10)

        # when: another one comes
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await _call(channel)

        # then: it may come again soon
        error = told(refusal.value)
        assert (error.reason, error.retry_after) == ("QUEUE_FULL", 0.2)
        leave.set()
        await first
    server.stop(0)


async def _call(channel: grpc.aio.Channel) -> bytes:
    work: Any = channel.unary_unary("/test.Host/Work")
    answer: bytes = await work(b"", timeout=10)
    return answer

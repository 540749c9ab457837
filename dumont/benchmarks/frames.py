"""A model host that computes nothing and sends messages at a given rate, to measure what carries them.

    python -m dumont.benchmarks.frames SOCKET INTERVAL_SECONDS

An answer has as many messages as ``max_new_tokens`` says, each with ``TOKENS`` tokens; the first is sent at
once, then one follows every interval. It writes a line when it serves, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import uvloop

from dumont.inference.v1 import inference_pb2
from dumont.model_host.v1 import model_host_service_pb2 as pb

SERVICE: Final = "dumont.model_host.v1.ModelHostService"
TOKENS: Final = 4


@dataclass
class _Call:
    """An answer of an exchange: messages in all, and those to come."""

    messages: int
    left: int


class Frames:
    """Answers of identical messages.

    Args:
        interval: seconds between the messages of an answer.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        chunk = inference_pb2.TextChunk(text=" word" * TOKENS, token_ids=range(1000, 1000 + TOKENS))
        self._frame = pb.GenerateResponse(chunk=chunk).SerializeToString()

    def _finish(self, messages: int) -> bytes:
        usage = inference_pb2.Usage(prompt_tokens=1, output_tokens=messages * TOKENS)
        finish = inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_LENGTH, usage=usage)
        return pb.GenerateResponse(finish=finish).SerializeToString()

    async def generate(self, data: bytes, context: Any) -> None:
        """Answer a request with as many messages as it asks for tokens."""
        messages = pb.GenerateRequest.FromString(data).max_new_tokens
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(messages):
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            await context.write(self._frame)
            due += self._interval
        await context.write(self._finish(messages))

    async def exchange(self, orders: AsyncIterator[bytes], context: Any) -> None:
        """Answer many requests on one stream, as a model host does: what is due together goes together."""
        calls: dict[int, _Call] = {}
        writing = asyncio.Lock()

        async def send(numbers: Sequence[int]) -> None:
            frames = [frame for number in numbers if (frame := self._next(number, calls)) is not None]
            if frames:
                async with writing:
                    await context.write(pb.ExchangeResponse(frames=frames).SerializeToString())

        async def send_all() -> None:
            while True:
                await asyncio.sleep(self._interval)
                await send(list(calls))

        sending = asyncio.create_task(send_all())
        try:
            async for data in orders:
                order = pb.ExchangeRequest.FromString(data)
                if order.cancel:
                    calls.pop(order.call, None)
                    continue
                messages = pb.GenerateRequest.FromString(order.generate).max_new_tokens
                calls[order.call] = _Call(messages, messages)
                await send([order.call])
        finally:
            sending.cancel()

    def _next(self, number: int, calls: dict[int, _Call]) -> pb.ExchangeResponse.Frame | None:
        if (call := calls.get(number)) is None:
            return None
        call.left -= 1
        if call.left:
            return pb.ExchangeResponse.Frame(call=number, messages=[self._frame])
        del calls[number]
        messages = [self._frame, self._finish(call.messages)]
        return pb.ExchangeResponse.Frame(call=number, messages=messages, last=True)


async def main(socket: str, interval: str) -> None:
    """Serve until standard input ends."""
    server = grpc.aio.server()
    frames = Frames(float(interval))
    handlers: dict[str, Any] = {
        "Generate": grpc.unary_stream_rpc_method_handler(frames.generate),
        "Exchange": grpc.stream_stream_rpc_method_handler(frames.exchange),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    Path(socket).unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))

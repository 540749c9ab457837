"""A model host that computes nothing and sends messages at a given rate, to measure what carries them.

    python -m dumont.benchmarks.frames SOCKET INTERVAL_SECONDS

An answer has as many messages as ``max_new_tokens`` says, each with ``TOKENS`` tokens; the first is sent at
once, then one follows every interval. It writes a line when it serves, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

import grpc
import uvloop

from dumont.inference.v1 import inference_pb2
from dumont.model_host.v1 import model_host_service_pb2 as pb

SERVICE: Final = "dumont.model_host.v1.ModelHostService"
TOKENS: Final = 4


class Frames:
    """Answers of identical messages.

    Args:
        interval: seconds between the messages of an answer.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        chunk = inference_pb2.TextChunk(text=" word" * TOKENS, token_ids=range(1000, 1000 + TOKENS))
        self._frame = pb.GenerateResponse(chunk=chunk).SerializeToString()

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
        usage = inference_pb2.Usage(prompt_tokens=1, output_tokens=messages * TOKENS)
        finish = inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_LENGTH, usage=usage)
        await context.write(pb.GenerateResponse(finish=finish).SerializeToString())


async def main(socket: str, interval: str) -> None:
    """Serve on a Unix socket until the process is ended."""
    server = grpc.aio.server()
    handler: Any = grpc.unary_stream_rpc_method_handler(Frames(float(interval)).generate)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Generate": handler}),))
    Path(socket).unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))

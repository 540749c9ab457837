"""A load generator: a process that sends requests at a given moment and notes when the answers come.

    python -m dumont.benchmarks.load TARGET NAMES

``NAMES``: ``deployments/{id}`` of a controller, ``instances/{id}`` of a snapshotd, empty for a model host;
several of a kind, by comma, are asked in turn. It writes one line when it is connected. Then it reads a wave
as one line of JSON from standard input (``at``, ``prompts``, ``answer_tokens``), and writes one line when the
wave is over. Messages are only kept as they arrive, and parsed afterwards, so that it keeps up.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count, cycle
from typing import Any, Final

import grpc
import uvloop
from google.rpc.status_pb2 import Status

from dumont.controller.v1 import inference_service_pb2 as pb
from dumont.model_host.v1 import model_host_service_pb2 as host_pb
from dumont.rpc.channel import open_channel
from dumont.rpc.status import from_rpc_error, from_status

WAVE_SECONDS: Final = 900.0
# The messages of a request differ only in field 1, which names the deployment or the instance.
METHODS: Final = {
    "deployments": "/dumont.controller.v1.InferenceService/Generate",
    "instances": "/dumont.snapshotd.v1.InferenceService/Generate",
}
EXCHANGE: Final = "/dumont.model_host.v1.ModelHostService/Exchange"

Frames = list[tuple[float, bytes]]  # when each message came


class Load(ABC):
    """Requests to one target.

    Args:
        names: ``deployments/{id}`` of a controller or ``instances/{id}`` of a snapshotd, asked in turn; one
            empty name for a model host.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    async def wave(self, at: float, prompts: list[str], answer_tokens: int) -> dict[str, Any]:
        """Send a request for each prompt at monotonic time ``at``; every answer has all its tokens."""
        requests = [
            pb.GenerateRequest(
                deployment=name, prompt=prompt, max_new_tokens=answer_tokens, ignore_eos=True
            ).SerializeToString()
            for name, prompt in zip(cycle(self._names), prompts, strict=False)
        ]
        await asyncio.sleep(at - time.monotonic())
        cpu, began = _cpu_seconds(), time.monotonic()
        streams = await asyncio.gather(*map(self._stream, requests))
        load = (_cpu_seconds() - cpu) / (time.monotonic() - began)
        return {"streams": [_told(*stream) for stream in streams], "client_load": load}

    @abstractmethod
    async def _stream(self, request: bytes) -> tuple[float, Frames, str]:
        """When a request was sent, what came when, and the reason if it failed."""


class Calls(Load):
    """A call for each request, as any client makes it."""

    def __init__(self, channel: grpc.aio.Channel, names: Sequence[str]) -> None:
        super().__init__(names)
        method = METHODS[names[0].partition("/")[0]]
        self._generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)

    async def _stream(self, request: bytes) -> tuple[float, Frames, str]:
        frames: Frames = []
        sent = time.monotonic()
        try:
            async for frame in self._generate(request, timeout=WAVE_SECONDS):
                frames.append((time.monotonic(), frame))
        except grpc.aio.AioRpcError as error:
            return sent, frames, from_rpc_error(error).reason
        return sent, frames, ""


class Exchange(Load):
    """All requests on one stream, as snapshotd makes them to a model host."""

    def __init__(self, channel: grpc.aio.Channel, names: Sequence[str]) -> None:
        super().__init__(names)
        method: Any = channel.stream_stream(
            EXCHANGE,
            request_serializer=host_pb.ExchangeRequest.SerializeToString,
            response_deserializer=host_pb.ExchangeResponse.FromString,
        )
        self._call = method()
        self._writing = asyncio.Lock()
        self._numbers = count(1)
        self._ends: dict[int, tuple[Frames, asyncio.Future[str]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def _stream(self, request: bytes) -> tuple[float, Frames, str]:
        number, frames = next(self._numbers), Frames()
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ends[number] = (frames, end)
        order = host_pb.ExchangeRequest(call=number, generate=request, timeout=WAVE_SECONDS)
        sent = time.monotonic()
        async with self._writing:
            await self._call.write(order)
        return sent, frames, await end

    async def _read(self) -> None:
        reason = "STREAM_ENDED"
        try:
            async for response in self._call:
                now = time.monotonic()
                for frame in response.frames:
                    self._take(frame, now)
        except grpc.aio.AioRpcError as error:
            reason = from_rpc_error(error).reason
        for _, end in self._ends.values():
            end.set_result(reason)

    def _take(self, frame: host_pb.ExchangeResponse.Frame, now: float) -> None:
        frames, end = self._ends[frame.call]
        frames.extend((now, message) for message in frame.messages)
        if frame.last:
            del self._ends[frame.call]
            end.set_result(from_status(Status.FromString(frame.status)).reason if frame.status else "")


def _told(sent: float, frames: Frames, reason: str) -> dict[str, Any]:
    arrivals: list[tuple[float, int]] = []
    tier, finished = "", False
    for at, frame in frames:
        message = pb.GenerateResponse.FromString(frame)
        if message.HasField("start"):
            tier = pb.Tier.Name(message.start.tier).removeprefix("TIER_").lower()
        elif message.chunk.token_ids:
            arrivals.append((at, len(message.chunk.token_ids)))
        finished |= message.HasField("finish")
    return {
        "sent": sent,
        "arrivals": arrivals,
        "reason": reason or ("" if finished else "ANSWER_INCOMPLETE"),
        "tier": tier,
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def main(target: str, names: str) -> None:
    """Send the requests that standard input asks for, and print when the answers came."""
    async with open_channel(target) as channel:
        await channel.channel_ready()
        load = (Calls if names else Exchange)(channel, names.split(","))
        sys.stdout.write("{}\n")
        sys.stdout.flush()
        while line := await asyncio.to_thread(sys.stdin.readline):
            sys.stdout.write(json.dumps(await load.wave(**json.loads(line))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))

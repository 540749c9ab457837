"""``InferenceService``: requests are read once, and token streams pass through as bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from controller import convert
from controller.model import StartInfo
from controller.serving import Request, Serving
from dumont import engines, limits, names
from dumont.controller.v1 import inference_service_pb2 as pb
from dumont.errors import InvalidArgument
from dumont.rpc.streams import WRITE_SECONDS, PatientWriter

SERVICE = "dumont.controller.v1.InferenceService"
Context = grpc.aio.ServicerContext[Any, Any]
R = TypeVar("R", pb.GenerateRequest, pb.EmbedRequest)


class InferenceService:
    """``dumont.controller.v1.InferenceService``; the proto documents its methods.

    Args:
        serving: what answers.
        max_new_tokens: the most tokens that one answer may have.
        write_seconds: how long a frame may wait for its reader before the instance is released.
    """

    def __init__(self, serving: Serving, max_new_tokens: int, write_seconds: float = WRITE_SECONDS) -> None:
        self._write_seconds = write_seconds
        self._serving = serving
        self._max_new_tokens = max_new_tokens

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server without serializers, so that gRPC takes and returns bytes."""
        handlers: dict[str, Any] = {
            "Generate": grpc.unary_stream_rpc_method_handler(self.Generate),
            "Embed": grpc.unary_unary_rpc_method_handler(self.Embed),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def Generate(self, data: bytes, context: Context) -> None:
        request = _parse(pb.GenerateRequest(), data)
        deployment = names.parse(request.deployment, "deployments", "deployment")
        limits.check_generate({f.name: value for f, value in request.ListFields()}, self._max_new_tokens)
        default = min(limits.DEFAULT_MAX_NEW_TOKENS, self._max_new_tokens)
        request.max_new_tokens = request.max_new_tokens or default
        call = Request(
            deployment,
            engines.GENERATES,
            _rewrite(request),
            context.time_remaining(),
            max(1, request.n),
            len(data),
        )
        stream = _Stream(context, self._write_seconds)
        with stream.writer:
            await self._serving.generate(call, stream)

    async def Embed(self, data: bytes, context: Context) -> bytes:
        request = _parse(pb.EmbedRequest(), data)
        deployment = names.parse(request.deployment, "deployments", "deployment")
        limits.check_embed(request.inputs)
        call = Request(
            deployment, engines.EMBEDS, _rewrite(request), context.time_remaining(), size=len(data)
        )
        info, answer = await self._serving.embed(call)
        # Concatenated encodings merge, and the node's answer has no start.
        return pb.EmbedResponse(start=convert.start_info_message(info)).SerializeToString() + answer


class _Stream:
    """The caller's stream, to which frames are passed as they are."""

    def __init__(self, context: Context, write_seconds: float) -> None:
        self._held: list[Callable[[], None]] = []
        self.writer = PatientWriter(context, write_seconds, self._give_back)
        self.frame = self.writer.write

    def hold(self, give_back: Callable[[], None]) -> None:
        self._held.append(give_back)

    def _give_back(self) -> None:
        for give_back in self._held:
            give_back()

    async def start(self, info: StartInfo) -> None:
        await self.frame(pb.GenerateResponse(start=convert.start_info_message(info)).SerializeToString())


def _parse(request: R, data: bytes) -> R:
    # Checked here, where many requests may wait for a node that would refuse them.
    limits.check_size(len(data))
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise InvalidArgument("MALFORMED_REQUEST", "the request is not a valid protobuf message") from error
    return request


def _rewrite(request: R) -> Callable[[str], bytes]:
    """The node's request differs only in field 1, which names the instance there."""

    def build(instance: str) -> bytes:
        request.deployment = f"instances/{instance}"
        return request.SerializeToString()

    return build

"""Server reflection in both of its versions, with the comments of our protos."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from functools import cache
from importlib.resources import files
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_reflection.v1alpha import _async, reflection_pb2, reflection_pb2_grpc

V1ALPHA: Final = "grpc.reflection.v1alpha"
V1: Final = "grpc.reflection.v1"
SERVICE_NAMES: Final = (f"{V1ALPHA}.ServerReflection", f"{V1}.ServerReflection")


class Reflection(_async.ReflectionServicer):  # type: ignore[misc]
    """Describes services as the generated code does, which has no comments, and adds the comments."""

    async def ServerReflectionInfo(self, requests: Any, context: object) -> AsyncIterator[Any]:
        """See ``grpc.reflection``."""
        async for response in super().ServerReflectionInfo(requests, context):
            described = response.file_descriptor_response.file_descriptor_proto
            for index, file in enumerate(described):
                name = FileDescriptorProto.FromString(file).name
                described[index] = _documented().get(name, file)
            yield response


def add_reflection(names: Iterable[str], server: grpc.aio.Server) -> None:
    """Serve reflection of these services, and of itself: v1, and v1alpha, which older tools ask for."""
    servicer = Reflection((*names, *SERVICE_NAMES))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    _describe_v1()
    # The messages of v1 are those of v1alpha by another name.
    handler: Any = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAMES[1], methods),))


@cache
def _documented() -> dict[str, bytes]:
    """Our proto files with their comments, by name."""
    found: dict[str, bytes] = {}
    for package in ("dumont.controller", "dumont.snapshotd"):
        described = files(package) / "api.binpb"
        if described.is_file():
            for file in FileDescriptorSet.FromString(described.read_bytes()).file:
                if file.name.startswith("dumont/"):
                    found[file.name] = file.SerializeToString()
    return found


@cache
def _describe_v1() -> None:
    """Have the pool of descriptors know v1, which the library lacks."""
    file = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = file.name.replace("v1alpha", "v1")
    file.package = V1
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(f".{V1ALPHA}.", f".{V1}.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(V1ALPHA, V1)
        method.output_type = method.output_type.replace(V1ALPHA, V1)
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())

"""What a service says of itself by reflection, as grpcurl shows it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from dumont.controller.v1 import deployment_service_pb2_grpc
from dumont.rpc.server import add_standard_services, bind, new_server
from tests.rpc.fake_controller import FakeController

SERVICE = "dumont.controller.v1.DeploymentService"


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = new_server("controller.dumont")
    deployment_service_pb2_grpc.add_DeploymentServiceServicer_to_server(FakeController(), server)
    await add_standard_services(server, [SERVICE]).set_all(True)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    yield address
    await server.stop(0)


async def grpcurl(*arguments: str) -> str:
    program = Path(sys.executable).with_name("grpcurl")
    process = await asyncio.create_subprocess_exec(
        program, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_describe_shows_the_comments_and_the_resource(address: str) -> None:
    service = await grpcurl(address, "describe", SERVICE)
    assert "// Checks the model before it creates the deployment." in service
    message = await grpcurl(address, "describe", "dumont.controller.v1.Deployment")
    assert "// A Hugging Face id or a directory on the nodes." in message
    assert 'type:"controller.dumont/Deployment"' in message.replace(" ", "")
    assert 'pattern:"deployments/{deployment}"' in message.replace(" ", "")


async def test_everything_that_is_listed_can_be_described(address: str) -> None:
    listed = (await grpcurl(address, "list")).split()
    assert {"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"} <= set(listed)
    for service in listed:
        assert f"service {service.rpartition('.')[2]}" in await grpcurl(address, "describe", service)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_both_versions_of_reflection_answer(address: str, version: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        reflect: Any = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        call = reflect()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.done_writing()
        response = await call.read()
    assert SERVICE in {service.name for service in response.list_services_response.service}

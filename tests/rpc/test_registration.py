"""A node keeps telling its controller that it is there, whatever fails on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from dumont.controller.v1 import node_service_pb2 as controller_pb2
from dumont.controller.v1 import node_service_pb2_grpc as controller_grpc
from dumont.snapshotd.v1 import node_service_pb2 as node_pb2
from snapshotd.adapters import registration

HEARTBEAT_SECONDS = 0.01


class Controller(controller_grpc.NodeServiceServicer):
    """Counts what it hears."""

    def __init__(self) -> None:
        self.registrations = 0
        self.beat = asyncio.Event()

    async def RegisterNode(
        self, request: controller_pb2.RegisterNodeRequest, context: object
    ) -> controller_pb2.RegisterNodeResponse:
        self.registrations += 1
        return controller_pb2.RegisterNodeResponse(controller_id="controller-1")

    async def Heartbeat(
        self, request: controller_pb2.HeartbeatRequest, context: object
    ) -> controller_pb2.HeartbeatResponse:
        self.beat.set()
        return controller_pb2.HeartbeatResponse()


class FullDisk:
    """An owner that cannot be written down at first."""

    controller = ""

    def __init__(self) -> None:
        self.claims = 0

    def claim(self, controller: str) -> None:
        self.claims += 1
        if self.claims == 1:
            raise OSError(28, "No space left on device")


@pytest.fixture
async def controller(free_port: Callable[[], int]) -> AsyncIterator[tuple[str, Controller]]:
    servicer = Controller()
    server = grpc.aio.server()
    controller_grpc.add_NodeServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{free_port()}"
    server.add_insecure_port(address)
    await server.start()
    yield address, servicer
    await server.stop(None)


async def test_a_node_whose_disk_was_full_registers_once_there_is_room(
    controller: tuple[str, Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "RETRY_SECONDS", HEARTBEAT_SECONDS)
    address, servicer = controller
    owner = FullDisk()
    task = asyncio.create_task(
        registration.keep_registered(
            address, "127.0.0.1:1", "node-1", node_pb2.Node, HEARTBEAT_SECONDS, owner
        )
    )
    try:
        async with asyncio.timeout(10):
            await servicer.beat.wait()
    finally:
        task.cancel()
    assert (owner.claims, servicer.registrations) == (2, 2)

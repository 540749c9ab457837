"""The controller's real servicers on a loopback port, over nodes in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest

from controller.adapters.clock import SystemClock
from controller.assembly import Controller, assemble
from controller.config import Config
from controller.identity import Established, Identity
from controller.main import DOMAIN, LIMITS, SERVICES, add_services
from controller.model import Node, NodeState
from dumont.rpc.operations import Operations
from dumont.rpc.server import add_standard_services, bind, new_server
from tests.fakes.memory_nodes import MemoryNodes
from tests.fakes.memory_registry import MemoryRegistry


@dataclass
class Served:
    controller: Controller
    nodes: MemoryNodes
    channel: grpc.aio.Channel


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    clock = SystemClock()
    nodes = MemoryNodes(clock)
    nodes.add_node("n1")
    registry = MemoryRegistry()
    who = await registry.join(lambda *_: Established(Identity("controller", 1)), "controller:7070", 10.0)
    controller = await assemble(nodes, registry, clock, who)
    await controller.core.fleet.register(Node("n1", "n1:7071", checkpoint_capable=True))
    async with asyncio.timeout(5):
        await controller.core.inventory.until(
            lambda: controller.core.inventory.nodes["n1"].state is NodeState.READY
        )
    server = new_server(DOMAIN, LIMITS)
    health = add_standard_services(server, SERVICES)
    running = Operations(DOMAIN)
    add_services(server, controller, running, Config(), asyncio.Event())
    address = bind(server, "127.0.0.1:0")
    await server.start()
    await health.set_all(True)
    async with grpc.aio.insecure_channel(address) as channel:
        yield Served(controller, nodes, channel)
    nodes.release_all()
    await server.stop(0)
    await running.close()
    await controller.close()

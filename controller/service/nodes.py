"""``NodeService``: where nodes register and report."""

from __future__ import annotations

import asyncio
from typing import Any

from google.longrunning import operations_pb2

from controller import convert
from controller.core import Core
from controller.migration import Migrations
from controller.model import InstanceState, Node, NodeState
from dumont import names
from dumont.controller.v1 import node_service_pb2 as pb
from dumont.controller.v1 import node_service_pb2_grpc as pb_grpc
from dumont.errors import InvalidArgument
from dumont.rpc.operations import Operations, Progress
from dumont.rpc.pages import page


class NodeService(pb_grpc.NodeServiceServicer):
    """``dumont.controller.v1.NodeService``; the proto documents its methods.

    Args:
        core: the ports and the facts.
        migrations: what empties nodes.
        operations: the long-running operations of this service.
        interval: seconds that nodes should leave between heartbeats.
    """

    def __init__(self, core: Core, migrations: Migrations, operations: Operations, interval: float) -> None:
        self._core = core
        self._migrations = migrations
        self._operations = operations
        self._fleet = core.fleet
        self._inventory = core.inventory
        self._interval = interval

    async def RegisterNode(self, request: pb.RegisterNodeRequest, context: object) -> pb.RegisterNodeResponse:
        identifier = names.check_id(request.node_id, "node_id")
        node = await self._fleet.register(convert.node(identifier, request.node), request.controller_id)
        return pb.RegisterNodeResponse(
            node=convert.node_message(node),
            heartbeat_interval=convert.duration(self._interval),
            controller_id=self._fleet.controller,
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: object) -> pb.HeartbeatResponse:
        if request.memory_available_bytes < 0:
            raise InvalidArgument(
                "NEGATIVE_MEMORY",
                "memory_available_bytes must not be negative",
                field="memory_available_bytes",
            )
        facts: dict[str, Any] = {}
        # A snapshotd of an earlier version reports none of these.
        if request.gpus:
            facts["gpus"] = convert.gpus(request.gpus)
        for field in ("disk_free_bytes", "weight_cache_bytes"):
            if value := getattr(request, field):
                facts[field] = value
        identifier = names.parse(request.name, "nodes", "name")
        self._fleet.heartbeat(identifier, request.memory_available_bytes, **facts)
        return pb.HeartbeatResponse()

    async def GetNode(self, request: pb.GetNodeRequest, context: object) -> pb.Node:
        return self._message(self._inventory.node(names.parse(request.name, "nodes", "name")))

    async def ListNodes(self, request: pb.ListNodesRequest, context: object) -> pb.ListNodesResponse:
        found, token = page(self._inventory.nodes, request.page_size, request.page_token)
        return pb.ListNodesResponse(nodes=[self._message(node) for node in found], next_page_token=token)

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        ready = [node.id for node in self._inventory.nodes.values() if node.state is NodeState.READY]
        answers = await asyncio.gather(*map(self._core.nodes.list_models, ready), return_exceptions=True)
        held = {
            f"{one.model} {one.node}": one
            for answer in answers
            # A node that does not answer is listed with its state; what the others have is told all the same.
            if not isinstance(answer, BaseException)
            for one in answer
        }
        found, token = page(held, request.page_size, request.page_token)
        return pb.ListModelsResponse(
            models=[
                pb.NodeModel(
                    model=one.model,
                    node=f"nodes/{one.node}",
                    engine=one.engine,
                    weights_size_bytes=one.weights_bytes,
                    problem=one.problem,
                )
                for one in found
            ],
            next_page_token=token,
        )

    async def DrainNode(self, request: pb.DrainNodeRequest, context: object) -> operations_pb2.Operation:
        node = self._inventory.node(names.parse(request.name, "nodes", "name")).id
        timeout = convert.optional_duration(request, "timeout", "timeout")

        async def work(progress: Progress) -> pb.DrainNodeResponse:
            left = await self._migrations.drain(
                node, timeout, lambda count: progress.update(instances_left=count)
            )
            return convert.drained_message(node, left)

        metadata = pb.DrainNodeMetadata(
            node=f"nodes/{node}",
            create_time=convert.timestamp(self._core.clock.moment().wall),
            instances_total=len(self._inventory.instances_on(node)),
        )
        return await self._operations.begin("drain", work, metadata)

    async def UndrainNode(self, request: pb.UndrainNodeRequest, context: object) -> pb.Node:
        node = names.parse(request.name, "nodes", "name")
        return self._message(await self._core.fleet.set_draining(node, False))

    def _message(self, node: Node) -> pb.Node:
        tenants = self._inventory.instances_on(node.id)
        parked = (i.report.ram_bytes for i in tenants if i.state is InstanceState.PARKED)
        return convert.node_message(
            node, self._inventory.held_bytes(node.id), sum(i.report.ram_bytes for i in tenants), sum(parked)
        )

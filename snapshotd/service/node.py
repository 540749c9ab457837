"""``dumont.snapshotd.v1.NodeService``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import grpc
import psutil

from dumont import names
from dumont.snapshotd.v1 import node_service_pb2 as pb2
from dumont.snapshotd.v1 import node_service_pb2_grpc as pb2_grpc
from snapshotd.jobs.context import Node
from snapshotd.model import Finding
from snapshotd.service import convert

Context = grpc.aio.ServicerContext[Any, Any]


class NodeServicer(pb2_grpc.NodeServiceServicer):
    """``dumont.snapshotd.v1.NodeService`` over this node.

    Args:
        node: the node's collaborators.
        node_id: the node's id.
        findings: of the checks of the machine at the start.
        object_store: the URL of its object store; empty if it has none.
        limit: bytes that its own snapshots may take; 0 for no limit.
    """

    def __init__(
        self, node: Node, node_id: str, findings: Sequence[Finding], object_store: str = "", limit: int = 0
    ) -> None:
        self.node = node
        self.node_id = node_id
        self.findings = findings
        self.object_store = object_store
        self.snapshot_limit = limit

    async def GetNode(self, request: pb2.GetNodeRequest, context: Context) -> pb2.Node:
        return self.describe()

    async def ResolveModel(self, request: pb2.ResolveModelRequest, context: Context) -> pb2.Model:
        return convert.model(await self.node.models.resolve(request.model, request.engine))

    def describe(self) -> pb2.Node:
        memory = psutil.virtual_memory()
        return pb2.Node(
            name=names.build("nodes", self.node_id),
            version=self.node.facts["dumont"],
            gpus=[
                pb2.Gpu(uuid=gpu.uuid, model=gpu.model, memory_total_bytes=gpu.memory_total)
                for gpu in (self.node.gpus.devices if self.node.gpus else ())
            ],
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            cpu_count=os.cpu_count() or 1,
            findings=convert.findings(self.findings),
            checkpoint_capable=all(finding.passed for finding in self.findings),
            object_store=self.object_store,
            snapshot_limit_bytes=self.snapshot_limit,
        )

"""``dumont.snapshotd.v1.NodeService``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import psutil

from dumont import names
from dumont.rpc.pages import page
from dumont.snapshotd.v1 import node_service_pb2 as pb2
from dumont.snapshotd.v1 import node_service_pb2_grpc as pb2_grpc
from snapshotd.instances.manager import Instances
from snapshotd.model import Budgets, Finding
from snapshotd.service import convert

Context = grpc.aio.ServicerContext[Any, Any]


class NodeServicer(pb2_grpc.NodeServiceServicer):
    """``dumont.snapshotd.v1.NodeService`` over this node.

    Args:
        instances: the node's instances.
        node_id: the node's id.
        findings: of the checks of the machine at the start.
        budgets: how much it has for what.
        object_store: the URL of its object store; empty if it has none.
        weight_cache_bytes: returns what its weight cache holds.
    """

    def __init__(
        self,
        instances: Instances,
        node_id: str,
        findings: Sequence[Finding],
        budgets: Budgets,
        object_store: str = "",
        weight_cache_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.instances = instances
        self.node = instances.node
        self.node_id = node_id
        self.findings = findings
        self.budgets = budgets
        self.object_store = object_store
        self.weight_cache_bytes = weight_cache_bytes

    async def GetNode(self, request: pb2.GetNodeRequest, context: Context) -> pb2.Node:
        return self.describe()

    async def ResolveModel(self, request: pb2.ResolveModelRequest, context: Context) -> pb2.Model:
        self.node.settings.engine(request.engine)
        return convert.model(await self.node.models.resolve(request.model, request.engine))

    async def ListModels(self, request: pb2.ListModelsRequest, context: Context) -> pb2.ListModelsResponse:
        held = {fact.name: fact for fact in await self.node.models.held()}
        found, token = page(held, request.page_size, request.page_token)
        return pb2.ListModelsResponse(
            models=[convert.held_model(fact) for fact in found], next_page_token=token
        )

    def describe(self) -> pb2.Node:
        memory = psutil.virtual_memory()
        return pb2.Node(
            name=names.build("nodes", self.node_id),
            version=self.node.facts["dumont"],
            gpus=self._gpus(),
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            cpu_count=os.cpu_count() or 1,
            findings=convert.findings(self.findings),
            checkpoint_capable=all(finding.passed for finding in self.findings),
            object_store=self.object_store,
            snapshot_limit_bytes=self.budgets.snapshots,
            instance_memory_limit_bytes=self.budgets.instances,
            parked_memory_limit_bytes=self.budgets.parked,
            weight_cache_limit_bytes=self.budgets.weights,
            weight_cache_bytes=self.weight_cache_bytes(),
            disk_free_bytes=self.node.disk.free(self.budgets.directory),
            engines=convert.engines(self.node.settings.engines.values()),
        )

    def _gpus(self) -> list[pb2.Gpu]:
        gpus = self.node.gpus
        if gpus is None:
            return []
        pids = [pid for one in self.instances.all() if one.gpu for pid in self.node.process_tree(one.pid)]
        own = gpus.status.used_by(pids)
        described = []
        for gpu in gpus.devices:
            unused = gpus.status.free(gpu.uuid)
            described.append(
                pb2.Gpu(
                    uuid=gpu.uuid,
                    model=gpu.model,
                    memory_total_bytes=gpu.memory_total,
                    memory_free_bytes=max(0, unused - gpus.reservations.reserved(gpu.uuid)),
                    memory_other_bytes=max(0, gpu.memory_total - unused - own.get(gpu.uuid, 0)),
                )
            )
        return described

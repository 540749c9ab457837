"""``dumont.snapshotd.v1.SnapshotService``."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from dumont import names
from dumont.snapshotd.v1 import snapshot_service_pb2 as pb2
from dumont.snapshotd.v1 import snapshot_service_pb2_grpc as pb2_grpc
from snapshotd import convert
from snapshotd.instances import Instances
from snapshotd.service.pages import page

Context = grpc.aio.ServicerContext[Any, Any]


class SnapshotServicer(pb2_grpc.SnapshotServiceServicer):
    def __init__(self, instances: Instances) -> None:
        self.instances = instances
        self.store = instances.node.store

    async def GetSnapshot(self, request: pb2.GetSnapshotRequest, context: Context) -> pb2.Snapshot:
        return convert.snapshot(await self.store.get(names.parse(request.name, "snapshots", "name")))

    async def ListSnapshots(
        self, request: pb2.ListSnapshotsRequest, context: Context
    ) -> pb2.ListSnapshotsResponse:
        facts = sorted(await self.store.list(), key=lambda fact: fact.manifest.id)
        shown, token = page(facts, request.page_size, request.page_token, lambda fact: fact.manifest.id)
        return pb2.ListSnapshotsResponse(snapshots=map(convert.snapshot, shown), next_page_token=token)

    async def DeleteSnapshot(self, request: pb2.DeleteSnapshotRequest, context: Context) -> Empty:
        await self.instances.delete_snapshot(names.parse(request.name, "snapshots", "name"))
        return Empty()

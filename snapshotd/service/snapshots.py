"""``dumont.snapshotd.v1.SnapshotService``."""

from __future__ import annotations

from typing import Any

import grpc
from google.longrunning import operations_pb2
from google.protobuf.empty_pb2 import Empty

from dumont import names
from dumont.errors import FailedPrecondition
from dumont.rpc.operations import Operations, Progress, Work
from dumont.rpc.pages import page
from dumont.snapshotd.v1 import snapshot_service_pb2 as pb2
from dumont.snapshotd.v1 import snapshot_service_pb2_grpc as pb2_grpc
from snapshotd import compatibility
from snapshotd.jobs.context import Node
from snapshotd.model import Snapshot
from snapshotd.repository.ports import ByteProgress
from snapshotd.service import convert
from snapshotd.snapshots.catalog import Snapshots

Context = grpc.aio.ServicerContext[Any, Any]


class SnapshotServicer(pb2_grpc.SnapshotServiceServicer):
    """``dumont.snapshotd.v1.SnapshotService`` over the catalog of snapshots."""

    def __init__(self, node: Node, snapshots: Snapshots, operations: Operations) -> None:
        self.node = node
        self.snapshots = snapshots
        self.operations = operations

    async def GetSnapshot(self, request: pb2.GetSnapshotRequest, context: Context) -> pb2.Snapshot:
        name = names.parse(request.name, "snapshots", "name")
        found = await self.snapshots.get(name)
        message = self._message(found)
        if found.published and (used := await self.snapshots.usage(name)) is not None:
            message.stored.CopyFrom(convert.stored(*used))
        return message

    async def ListSnapshots(
        self, request: pb2.ListSnapshotsRequest, context: Context
    ) -> pb2.ListSnapshotsResponse:
        found, rejected = await self.snapshots.list()
        messages = [self._message(one) for one in found] + [convert.rejected(one) for one in rejected]
        by_name = {message.name: message for message in messages}
        shown, token = page(by_name, request.page_size, request.page_token)
        return pb2.ListSnapshotsResponse(
            snapshots=shown, next_page_token=token, store_silence=self.snapshots.store_silence
        )

    async def DeleteSnapshot(self, request: pb2.DeleteSnapshotRequest, context: Context) -> Empty:
        await self.snapshots.delete(names.parse(request.name, "snapshots", "name"))
        return Empty()

    async def UndeleteSnapshot(self, request: pb2.UndeleteSnapshotRequest, context: Context) -> pb2.Snapshot:
        return self._message(await self.snapshots.undelete(names.parse(request.name, "snapshots", "name")))

    async def PublishSnapshot(
        self, request: pb2.PublishSnapshotRequest, context: Context
    ) -> operations_pb2.Operation:
        name = names.parse(request.name, "snapshots", "name")

        async def work(progress: Progress) -> pb2.Snapshot:
            return self._message(await self.snapshots.publish(name, byte_progress(progress)))

        return self._begin("publish", f"snapshots/{name}", work)

    async def PrefetchSnapshot(
        self, request: pb2.PrefetchSnapshotRequest, context: Context
    ) -> operations_pb2.Operation:
        name = names.parse(request.name, "snapshots", "name")

        async def work(progress: Progress) -> pb2.Snapshot:
            found = await self.snapshots.get_exactly(name, request.manifest_digest)
            if not found.local:
                await self.snapshots.fetch(found, byte_progress(progress))
            return self._message(await self.snapshots.get(name))

        return self._begin("prefetch", f"snapshots/{name}", work)

    async def VerifySnapshot(
        self, request: pb2.VerifySnapshotRequest, context: Context
    ) -> operations_pb2.Operation:
        name = names.parse(request.name, "snapshots", "name")

        async def work(progress: Progress) -> pb2.VerifySnapshotResponse:
            here, there = await self.snapshots.verify(name, byte_progress(progress))
            return pb2.VerifySnapshotResponse(local_bytes=here, published_bytes=there)

        return self._begin("verify", f"snapshots/{name}", work)

    async def PruneSnapshots(
        self, request: pb2.PruneSnapshotsRequest, context: Context
    ) -> operations_pb2.Operation:
        async def work(progress: Progress) -> pb2.PruneSnapshotsResponse:
            plan = await self.snapshots.plan_prune()
            if not request.dry_run:
                await self.snapshots.prune(plan)
            return convert.prune(plan)

        return self._begin("prune", "", work)

    def _begin(self, prefix: str, snapshot: str, work: Work) -> operations_pb2.Operation:
        metadata = pb2.SnapshotOperationMetadata(snapshot=snapshot)
        metadata.create_time.CopyFrom(convert.timestamp(self.node.clock.now()))
        return self.operations.start(prefix, work, metadata)

    def _message(self, snapshot: Snapshot) -> pb2.Snapshot:
        return convert.snapshot(snapshot, self._incompatibility(snapshot))

    def _incompatibility(self, snapshot: Snapshot) -> str:
        manifest = snapshot.manifest
        # The weights are compared at the restore, because their digest is known only once they have been
        # read.
        captured = {name: fact for name, fact in manifest.compatibility.items() if name != "weights"}
        try:
            compatibility.check(manifest.id, captured, self.node.facts_of(manifest.device, manifest.engine))
        except FailedPrecondition as error:
            return error.message
        return ""


def byte_progress(progress: Progress) -> ByteProgress:
    """Report bytes as the progress of an operation."""
    return lambda done, total: progress.update(bytes_done=done, bytes_total=total)

"""``SnapshotService``: the snapshots of all nodes."""

from __future__ import annotations

from dataclasses import replace

from google.longrunning import operations_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from controller import convert
from controller.core import Core
from controller.model import Snapshot
from controller.snapshots import Snapshots
from controller.starts.starts import Starts
from dumont import names
from dumont.controller.v1 import snapshot_service_pb2 as pb
from dumont.controller.v1 import snapshot_service_pb2_grpc as pb_grpc
from dumont.errors import AlreadyExists
from dumont.rpc.operations import Operations, Progress
from dumont.rpc.pages import page


class SnapshotService(pb_grpc.SnapshotServiceServicer):
    """``dumont.controller.v1.SnapshotService``; the proto documents its methods."""

    def __init__(self, core: Core, snapshots: Snapshots, starts: Starts, operations: Operations) -> None:
        self._core = core
        self._inventory = core.inventory
        self._snapshots = snapshots
        self._starts = starts
        self._operations = operations

    async def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: object
    ) -> operations_pb2.Operation:
        deployment = names.parse(request.deployment, "deployments", "deployment")
        identifier = self._new_id(request.snapshot_id, deployment)
        self._starts.check_capturable(deployment)

        async def work(progress: Progress) -> pb.Snapshot:
            def on_stage(instance: str, stage: str) -> None:
                progress.update(instance=f"instances/{instance}" if instance else "", stage=stage)

            captured = await self._starts.capture(deployment, identifier, on_stage)
            replaced = self._snapshots.replaced_by(captured)
            progress.update(replaces=[f"snapshots/{snapshot}" for snapshot in replaced])
            return self._message(captured)

        metadata = pb.CreateSnapshotMetadata(
            deployment=f"deployments/{deployment}",
            stage="waiting",
            create_time=self._now(),
        )
        return await self._operations.begin("snapshot", work, metadata)

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: object) -> pb.Snapshot:
        known = self._inventory.snapshot(names.parse(request.name, "snapshots", "name"))
        if known.published:
            # What it takes in the store changes with every other snapshot, so its node is asked.
            known = replace(known, stored=await self._snapshots.stored(known))
        return self._message(known)

    async def PrefetchSnapshot(
        self, request: pb.PrefetchSnapshotRequest, context: object
    ) -> operations_pb2.Operation:
        snapshot = names.parse(request.name, "snapshots", "name")
        wanted = names.parse(request.node, "nodes", "node") if request.node else ""
        node = self._snapshots.prefetch_node(snapshot, wanted)

        async def work(progress: Progress) -> pb.Snapshot:
            return self._message(await self._snapshots.prefetch(snapshot, node))

        metadata = pb.PrefetchSnapshotMetadata(
            snapshot=f"snapshots/{snapshot}", node=f"nodes/{node}", create_time=self._now()
        )
        return await self._operations.begin("prefetch", work, metadata)

    async def VerifySnapshot(
        self, request: pb.VerifySnapshotRequest, context: object
    ) -> operations_pb2.Operation:
        known = self._inventory.snapshot(names.parse(request.name, "snapshots", "name"))

        async def work(progress: Progress) -> pb.VerifySnapshotResponse:
            found = await self._snapshots.verify(known.id)
            return pb.VerifySnapshotResponse(
                local_bytes=found.local_bytes, published_bytes=found.published_bytes
            )

        metadata = pb.VerifySnapshotMetadata(
            snapshot=f"snapshots/{known.id}", node=f"nodes/{known.node}", create_time=self._now()
        )
        return await self._operations.begin("verify", work, metadata)

    async def PruneSnapshots(
        self, request: pb.PruneSnapshotsRequest, context: object
    ) -> operations_pb2.Operation:
        node = self._snapshots.store_node()

        async def work(progress: Progress) -> pb.PruneSnapshotsResponse:
            found = await self._snapshots.prune(node, request.dry_run)
            return pb.PruneSnapshotsResponse(
                objects=found.objects,
                object_count=found.object_count,
                size_bytes=found.size_bytes,
                kept_bytes=found.kept_bytes,
            )

        metadata = pb.PruneSnapshotsMetadata(node=f"nodes/{node}", create_time=self._now())
        return await self._operations.begin("prune", work, metadata)

    async def ListSnapshots(
        self, request: pb.ListSnapshotsRequest, context: object
    ) -> pb.ListSnapshotsResponse:
        known = self._inventory.snapshots
        if request.deployment:
            deployment = names.parse(request.deployment, "deployments", "deployment")
            known = {key: value for key, value in known.items() if value.deployment == deployment}
        if request.orphans:
            known = {key: value for key, value in known.items() if value.orphan}
        found, token = page(known, request.page_size, request.page_token)
        return pb.ListSnapshotsResponse(
            snapshots=[self._message(snapshot) for snapshot in found], next_page_token=token
        )

    async def AdoptSnapshot(self, request: pb.AdoptSnapshotRequest, context: object) -> pb.Snapshot:
        snapshot = names.parse(request.name, "snapshots", "name")
        wanted = names.parse(request.deployment, "deployments", "deployment") if request.deployment else ""
        return self._message(await self._snapshots.adopt(snapshot, wanted))

    async def UndeleteSnapshot(self, request: pb.UndeleteSnapshotRequest, context: object) -> pb.Snapshot:
        return self._message(await self._snapshots.undelete(names.parse(request.name, "snapshots", "name")))

    async def DeleteSnapshot(self, request: pb.DeleteSnapshotRequest, context: object) -> Empty:
        await self._snapshots.delete(names.parse(request.name, "snapshots", "name"))
        return Empty()

    def _now(self) -> Timestamp:
        return convert.timestamp(self._core.clock.moment().wall)

    def _new_id(self, wanted: str, deployment: str) -> str:
        if not wanted:
            return names.new_id(deployment[:48].rstrip("-"))
        identifier = names.check_id(wanted, "snapshot_id")
        if identifier in self._inventory.snapshots:
            raise AlreadyExists(
                "SNAPSHOT_EXISTS",
                f"snapshots/{identifier} exists; choose another id, or delete it first",
                field="snapshot_id",
                metadata={"snapshot": f"snapshots/{identifier}"},
            )
        return identifier

    def _message(self, snapshot: Snapshot) -> pb.Snapshot:
        owner = self._core.deployments.by_id.get(snapshot.deployment)
        if owner is None or owner.uid != snapshot.owner:
            return convert.snapshot_message(snapshot, None, None)
        last_use = self._core.deployments.last_use.get(owner.id)
        return convert.snapshot_message(snapshot, last_use, owner.ttl_seconds)

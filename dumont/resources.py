"""Instances, snapshots and nodes, asynchronously: parts of ``dumont.client.AsyncClient``."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from dumont import arguments, convert, operations
from dumont.arguments import full_name
from dumont.connection import Connection
from dumont.controller.v1 import (
    deployment_service_pb2,
    instance_service_pb2,
    node_service_pb2,
    snapshot_service_pb2,
)
from dumont.errors import NotFound
from dumont.types import Instance, Node, NodeModel, Pruned, Remainder, Snapshot, SnapshotProgress, Verified


class AsyncInstances:
    """The instances of all nodes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, name: str) -> Instance:
        """The instance of this name."""
        request = instance_service_pb2.GetInstanceRequest(name=full_name(name, "instances", "name"))
        with self._connection.errors():
            return convert.instance(await self._connection.instances.GetInstance(request))

    async def find(self, target: str) -> list[Instance]:
        """The instance of this name or else the instances of the deployment of this name.

        Raises:
            NotFound: there is neither.
        """
        if not isinstance(target, str):
            full_name(target, "instances", "target")
        if not target.startswith("deployments/"):
            try:
                return [await self.get(target)]
            except NotFound:
                if "/" in target:
                    raise
        found = await self.list(target)
        if not found:
            deployment = await self._deployment(target)
            advice = (
                f"{deployment} has no instance at present; its next request starts one"
                if deployment
                else f"there is neither an instance nor a deployment {target!r}; "
                "list the instances to see what there is"
            )
            raise NotFound("INSTANCE_NOT_FOUND", advice, metadata={"name": target})
        return found

    async def _deployment(self, target: str) -> str:
        """The name of the deployment that is called so; empty if there is none."""
        name = full_name(target, "deployments", "target")
        request = deployment_service_pb2.GetDeploymentRequest(name=name)
        try:
            with self._connection.errors():
                return (await self._connection.deployments.GetDeployment(request)).name
        except NotFound:
            return ""

    async def park(self, name: str) -> Instance:
        """Freeze an instance; its process stays."""
        request = instance_service_pb2.ParkInstanceRequest(name=full_name(name, "instances", "name"))
        with self._connection.errors():
            return convert.instance(await self._connection.instances.ParkInstance(request))

    async def resume(self, name: str) -> Instance:
        """Let a parked instance serve again."""
        request = instance_service_pb2.ResumeInstanceRequest(name=full_name(name, "instances", "name"))
        with self._connection.errors():
            return convert.instance(await self._connection.instances.ResumeInstance(request))

    async def migrate(
        self,
        name: str,
        *,
        node: str | None = None,
        gpu: str | None = None,
        cold: bool = False,
        wait: bool = True,
        progress: Callable[[str], None] | None = None,
    ) -> Instance:
        """Bring an instance to another GPU of its node, or to another node; cancelling this gives it up.

        Args:
            name: the instance.
            node: where it goes; the controller chooses one if this and ``gpu`` are left out.
            gpu: UUID or index of another GPU of its own node.
            cold: load the model again on the other node if no snapshot can be brought there.
            wait: until the source has answered its requests and has ended; else only begin.
            progress: called with each new stage.

        Returns:
            The instance that serves now or, without ``wait``, the source as it was.

        Raises:
            FailedPrecondition: it cannot be brought there; nothing has changed.
        """
        arguments.check_callback(progress, "progress")
        request = arguments.request(
            instance_service_pb2.MigrateInstanceRequest,
            name=full_name(name, "instances", "name"),
            node=full_name(node, "nodes", "node") if node else None,
            gpu=gpu,
            cold=cold,
        )

        def report(metadata: instance_service_pb2.MigrateInstanceMetadata) -> None:
            if progress:
                progress(metadata.stage)

        source = await self.get(name)
        with self._connection.errors():
            operation = await self._connection.instances.MigrateInstance(request)
        if not wait:
            return source
        message = await operations.follow(
            self._connection,
            operation,
            instance_service_pb2.Instance(),
            instance_service_pb2.MigrateInstanceMetadata(),
            report if progress else None,
        )
        return convert.instance(message)

    async def stop(self, name: str) -> None:
        """End an instance; its deployment's next request starts another."""
        request = instance_service_pb2.StopInstanceRequest(name=full_name(name, "instances", "name"))
        with self._connection.errors():
            await self._connection.instances.StopInstance(request)

    async def watch(self) -> AsyncIterator[tuple[Instance, ...]]:
        """All instances now, and again after each change."""
        known: dict[str, Instance] = {}
        synchronized = False
        call: Any = self._connection.instances.WatchInstances(instance_service_pb2.WatchInstancesRequest())
        try:
            with self._connection.errors():
                async for response in call:
                    match response.WhichOneof("change"):
                        case "instance":
                            known[response.instance.name] = convert.instance(response.instance)
                        case "removed":
                            known.pop(response.removed, None)
                        case "synchronized":
                            synchronized = True
                    if synchronized:
                        yield tuple(known.values())
        finally:
            call.cancel()

    async def logs(self, name: str, *, tail: int = 0, follow: bool = False) -> AsyncIterator[str]:
        """What an instance's model host has printed, in pieces.

        Args:
            name: the instance.
            tail: how many of the last lines to begin with; 0: all that is kept.
            follow: stay, and go on as lines are printed.
        """
        request = arguments.request(
            instance_service_pb2.StreamInstanceLogsRequest,
            name=full_name(name, "instances", "name"),
            tail_lines=tail,
            follow=follow,
        )
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        call: Any = self._connection.instances.StreamInstanceLogs(request)
        try:
            with self._connection.errors():
                async for response in call:
                    if text := decoder.decode(response.data):
                        yield text
        finally:
            call.cancel()

    async def list(self, deployment: str | None = None) -> list[Instance]:
        """All instances, or those of one deployment."""
        request = instance_service_pb2.ListInstancesRequest(
            deployment=full_name(deployment, "deployments", "deployment") if deployment else ""
        )
        found = pages(self._connection, self._connection.instances.ListInstances, request, "instances")
        return [convert.instance(message) async for message in found]


class AsyncSnapshots:
    """The snapshots of all nodes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(
        self,
        deployment: str,
        *,
        snapshot_id: str | None = None,
        progress: Callable[[SnapshotProgress], None] | None = None,
    ) -> Snapshot:
        """Capture a deployment; cancelling this cancels the capture.

        Args:
            deployment: of its instances, one that no prompt has entered is captured; if there is none, one is
                started for it, and ended again. Earlier snapshots for the same kind of node are replaced.
            snapshot_id: chosen by the controller when left out.
            progress: called at each new step.
        """
        arguments.check_callback(progress, "progress")
        request = arguments.request(
            snapshot_service_pb2.CreateSnapshotRequest,
            deployment=full_name(deployment, "deployments", "deployment"),
            snapshot_id=snapshot_id,
        )

        def report(metadata: snapshot_service_pb2.CreateSnapshotMetadata) -> None:
            if progress:
                progress(SnapshotProgress(metadata.stage, metadata.instance, tuple(metadata.replaces)))

        with self._connection.errors():
            operation = await self._connection.snapshots.CreateSnapshot(request)
        message = await operations.follow(
            self._connection,
            operation,
            snapshot_service_pb2.Snapshot(),
            snapshot_service_pb2.CreateSnapshotMetadata(),
            report if progress else None,
        )
        return convert.snapshot(message)

    async def get(self, name: str) -> Snapshot:
        """The snapshot of this name."""
        request = snapshot_service_pb2.GetSnapshotRequest(name=full_name(name, "snapshots", "name"))
        with self._connection.errors():
            return convert.snapshot(await self._connection.snapshots.GetSnapshot(request))

    async def delete(self, name: str) -> None:
        """Delete a snapshot; refused while a restore reads it."""
        request = snapshot_service_pb2.DeleteSnapshotRequest(name=full_name(name, "snapshots", "name"))
        with self._connection.errors():
            await self._connection.snapshots.DeleteSnapshot(request)

    async def adopt(self, name: str, *, deployment: str | None = None) -> Snapshot:
        """Make an orphan a deployment's snapshot, replacing its earlier ones.

        Args:
            name: the snapshot.
            deployment: when left out, the one that the snapshot names. Created if there is none.

        Raises:
            FailedPrecondition: SNAPSHOT_NOT_ORPHAN, MODEL_DIFFERS, or it is quarantined.
        """
        request = snapshot_service_pb2.AdoptSnapshotRequest(
            name=full_name(name, "snapshots", "name"),
            deployment=full_name(deployment, "deployments", "deployment") if deployment else "",
        )
        with self._connection.errors():
            return convert.snapshot(await self._connection.snapshots.AdoptSnapshot(request))

    async def undelete(self, name: str) -> Snapshot:
        """Publish a deleted snapshot again, as an orphan, within the object store's grace time.

        Raises:
            NotFound: SNAPSHOT_NOT_DELETED, nothing is left of it.
            FailedPrecondition: OBJECT_STORE_NOT_CONFIGURED, no node has one.
        """
        request = snapshot_service_pb2.UndeleteSnapshotRequest(name=full_name(name, "snapshots", "name"))
        with self._connection.errors():
            return convert.snapshot(await self._connection.snapshots.UndeleteSnapshot(request))

    async def prefetch(self, name: str, *, node: str | None = None) -> Snapshot:
        """Fetch a published snapshot to a node, so that the deployment's next start there is a local one.

        Args:
            name: the snapshot.
            node: when left out, nothing is done if a node holds it, else it goes where a start would take it.

        Raises:
            FailedPrecondition: SNAPSHOT_OUT_OF_REACH, no such node may restore it.
            DataLoss: it is damaged in the object store.
        """
        request = snapshot_service_pb2.PrefetchSnapshotRequest(
            name=full_name(name, "snapshots", "name"), node=full_name(node, "nodes", "node") if node else ""
        )
        with self._connection.errors():
            operation = await self._connection.snapshots.PrefetchSnapshot(request)
        message = await operations.follow(
            self._connection,
            operation,
            snapshot_service_pb2.Snapshot(),
            snapshot_service_pb2.PrefetchSnapshotMetadata(),
        )
        return convert.snapshot(message)

    async def verify(self, name: str) -> Verified:
        """Read all of a snapshot, on its node and in the object store.

        Raises:
            DataLoss: the snapshot is damaged, and now quarantined.
        """
        request = snapshot_service_pb2.VerifySnapshotRequest(name=full_name(name, "snapshots", "name"))
        with self._connection.errors():
            operation = await self._connection.snapshots.VerifySnapshot(request)
        found = await operations.follow(
            self._connection,
            operation,
            snapshot_service_pb2.VerifySnapshotResponse(),
            snapshot_service_pb2.VerifySnapshotMetadata(),
        )
        return Verified(found.local_bytes, found.published_bytes)

    async def prune(self, *, dry_run: bool = False) -> Pruned:
        """Delete from the object store what no published snapshot needs.

        Args:
            dry_run: only report what would be deleted.

        Raises:
            FailedPrecondition: OBJECT_STORE_NOT_CONFIGURED, no node has one.
        """
        request = arguments.request(snapshot_service_pb2.PruneSnapshotsRequest, dry_run=dry_run)
        with self._connection.errors():
            operation = await self._connection.snapshots.PruneSnapshots(request)
        found = await operations.follow(
            self._connection,
            operation,
            snapshot_service_pb2.PruneSnapshotsResponse(),
            snapshot_service_pb2.PruneSnapshotsMetadata(),
        )
        return Pruned(tuple(found.objects), found.object_count, found.size_bytes, found.kept_bytes, dry_run)

    async def list(self, deployment: str | None = None, *, orphans: bool = False) -> list[Snapshot]:
        """All snapshots, or those of one deployment, or only the orphans among them."""
        request = arguments.request(
            snapshot_service_pb2.ListSnapshotsRequest,
            deployment=full_name(deployment, "deployments", "deployment") if deployment else None,
            orphans=orphans,
        )
        found = pages(self._connection, self._connection.snapshots.ListSnapshots, request, "snapshots")
        return [convert.snapshot(message) async for message in found]


class AsyncNodes:
    """The nodes that a controller knows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list(self) -> list[Node]:
        """All nodes."""
        request = node_service_pb2.ListNodesRequest()
        found = pages(self._connection, self._connection.nodes.ListNodes, request, "nodes")
        return [convert.node(message) async for message in found]

    async def models(self) -> Sequence[NodeModel]:
        """The models that the ready nodes have, once for each node."""
        request = node_service_pb2.ListModelsRequest()
        found = pages(self._connection, self._connection.nodes.ListModels, request, "models")
        return [convert.node_model(message) async for message in found]

    async def get(self, name: str) -> Node:
        """The node of this name."""
        request = node_service_pb2.GetNodeRequest(name=full_name(name, "nodes", "name"))
        with self._connection.errors():
            return convert.node(await self._connection.nodes.GetNode(request))

    async def drain(
        self,
        name: str,
        *,
        timeout: float | None = None,
        wait: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Remainder, ...]:
        """Start nothing more on a node, and bring what runs there to others. It stays so until ``undrain``.

        Args:
            name: the node.
            timeout: seconds after which to return with what is left; the node goes on draining.
            wait: until nothing is left that could go elsewhere; else only begin.
            progress: called with the numbers of instances that are left and that there were.

        Returns:
            What is still on the node, and why; empty without ``wait``.
        """
        arguments.check_callback(progress, "progress")
        within = arguments.to_timeout(timeout)
        request = node_service_pb2.DrainNodeRequest(name=full_name(name, "nodes", "name"))
        if within is not None:
            request.timeout.CopyFrom(convert.duration(within))

        def report(metadata: node_service_pb2.DrainNodeMetadata) -> None:
            if progress:
                progress(metadata.instances_left, metadata.instances_total)

        with self._connection.errors():
            operation = await self._connection.nodes.DrainNode(request)
        if not wait:
            return ()
        message = await operations.follow(
            self._connection,
            operation,
            node_service_pb2.DrainNodeResponse(),
            node_service_pb2.DrainNodeMetadata(),
            report if progress else None,
        )
        return convert.remainders(message)

    async def undrain(self, name: str) -> Node:
        """Let a node take starts again."""
        request = node_service_pb2.UndrainNodeRequest(name=full_name(name, "nodes", "name"))
        with self._connection.errors():
            return convert.node(await self._connection.nodes.UndrainNode(request))


async def pages(connection: Connection, method: Any, request: Any, field: str) -> AsyncIterator[Any]:
    """Every ``field`` of a List method, page after page."""
    while True:
        with connection.errors():
            response = await method(request)
        for message in getattr(response, field):
            yield message
        if not response.next_page_token:
            return
        request.page_token = response.next_page_token

"""``dumont.snapshotd.v1.InstanceService``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
from google.longrunning import operations_pb2
from google.protobuf.empty_pb2 import Empty

from dumont import engines, names
from dumont.errors import NotFound
from dumont.rpc.operations import Operations, Progress
from dumont.rpc.pages import page
from dumont.rpc.streams import until_draining
from dumont.rpc.structs import from_struct
from dumont.snapshotd.v1 import instance_service_pb2 as pb2
from dumont.snapshotd.v1 import instance_service_pb2_grpc as pb2_grpc
from snapshotd.instances.manager import Instances
from snapshotd.instances.move import move
from snapshotd.jobs.observers import Observers
from snapshotd.model import Instance, State
from snapshotd.service import convert
from snapshotd.service.logs import read_log
from snapshotd.service.snapshots import byte_progress
from snapshotd.snapshots.catalog import Snapshots

Context = grpc.aio.ServicerContext[Any, Any]


class InstanceServicer(pb2_grpc.InstanceServiceServicer):
    """``dumont.snapshotd.v1.InstanceService`` over the instances of this node."""

    def __init__(
        self,
        instances: Instances,
        snapshots: Snapshots,
        operations: Operations,
        observers: Observers,
        draining: asyncio.Event,
    ) -> None:
        self.instances = instances
        self.snapshots = snapshots
        self.operations = operations
        self.observers = observers
        self.draining = draining
        # For each instance, the request of its start or restore and the name of the operation.
        self._begun: dict[str, tuple[bytes, str]] = {}

    async def StartInstance(
        self, request: pb2.StartInstanceRequest, context: Context
    ) -> operations_pb2.Operation:
        instance = names.check_id(request.instance_id, "instance_id")
        if (begun := self._same(instance, request)) is not None:
            return begun
        weights = convert.weights(request.weights)
        options = self._engine_options(request)
        model = await self.instances.node.models.resolve(request.model, request.engine)
        # The same request may have arrived again meanwhile.
        if (begun := self._same(instance, request)) is not None:
            return begun
        new = self._new(instance, request.deployment, request.model, model.engine, State.STARTING)
        self.instances.admit(replace(new, weights=weights, engine_options=options))

        async def work(progress: Progress) -> pb2.Instance:
            with self._watched(instance, progress):
                return convert.instance(await self.instances.start(instance, model, request.gpu))

        return self._begin("start", instance, request, work)

    async def RestoreInstance(
        self, request: pb2.RestoreInstanceRequest, context: Context
    ) -> operations_pb2.Operation:
        instance = names.check_id(request.instance_id, "instance_id")
        if (begun := self._same(instance, request)) is not None:
            return begun
        snapshot = await self.snapshots.get_exactly(
            names.parse(request.snapshot, "snapshots", "snapshot"), request.manifest_digest
        )
        if (begun := self._same(instance, request)) is not None:
            return begun
        manifest = snapshot.manifest
        deployment = request.deployment or manifest.deployment
        new = self._new(instance, deployment, manifest.model, manifest.engine, State.RESTORING)
        self.instances.admit(
            replace(
                new,
                snapshot=manifest.id,
                weights=manifest.weights,
                engine_options=manifest.engine_options,
            )
        )

        async def work(progress: Progress) -> pb2.Instance:
            async def fetch() -> None:
                await self.snapshots.fetch(snapshot, byte_progress(progress))

            with self._watched(instance, progress):
                return convert.instance(
                    await self.instances.restore(
                        instance, snapshot, None if snapshot.local else fetch, request.gpu
                    )
                )

        return self._begin("restore", instance, request, work)

    async def CaptureInstance(
        self, request: pb2.CaptureInstanceRequest, context: Context
    ) -> operations_pb2.Operation:
        instance = names.parse(request.name, "instances", "name")
        snapshot = names.check_id(request.snapshot_id, "snapshot_id")
        self.instances.get(instance)

        async def work(progress: Progress) -> Any:
            with self._watched(instance, progress):
                return convert.snapshot(await self.instances.capture(instance, snapshot))

        return self.operations.start("capture", work, pb2.OperationMetadata(instance=f"instances/{instance}"))

    async def ParkInstance(self, request: pb2.ParkInstanceRequest, context: Context) -> pb2.Instance:
        return convert.instance(await self.instances.park(names.parse(request.name, "instances", "name")))

    async def ResumeInstance(self, request: pb2.ResumeInstanceRequest, context: Context) -> pb2.Instance:
        instance = names.parse(request.name, "instances", "name")
        return convert.instance(await self.instances.resume(instance, request.gpu))

    async def MoveInstance(self, request: pb2.MoveInstanceRequest, context: Context) -> pb2.Instance:
        instance = names.parse(request.name, "instances", "name")
        return convert.instance(await move(self.instances, instance, request.gpu))

    async def StopInstance(self, request: pb2.StopInstanceRequest, context: Context) -> Empty:
        await self.instances.stop(names.parse(request.name, "instances", "name"))
        return Empty()

    async def GetInstance(self, request: pb2.GetInstanceRequest, context: Context) -> pb2.Instance:
        return convert.instance(self.instances.get(names.parse(request.name, "instances", "name")))

    async def ListInstances(
        self, request: pb2.ListInstancesRequest, context: Context
    ) -> pb2.ListInstancesResponse:
        facts = {fact.id: fact for fact in self.instances.all()}
        shown, token = page(facts, request.page_size, request.page_token)
        return pb2.ListInstancesResponse(instances=map(convert.instance, shown), next_page_token=token)

    async def WatchInstances(
        self, request: pb2.WatchInstancesRequest, context: Context
    ) -> AsyncIterator[pb2.WatchInstancesResponse]:
        async with aclosing(until_draining(self._changes(), self.draining)) as changes:
            async for change in changes:
                yield change

    async def StreamInstanceLogs(
        self, request: pb2.StreamInstanceLogsRequest, context: Context
    ) -> AsyncIterator[pb2.StreamInstanceLogsResponse]:
        instance = names.parse(request.name, "instances", "name")
        self.instances.get(instance)
        path = self.instances.node.instance_directory(instance) / "host.log"
        lines = until_draining(read_log(path, request.tail_lines, request.follow), self.draining)
        async with aclosing(lines):
            async for data in lines:
                yield pb2.StreamInstanceLogsResponse(data=data)

    async def _changes(self) -> AsyncIterator[pb2.WatchInstancesResponse]:
        async with self.instances.changes() as changes:
            known = changes.qsize()
            while True:
                if known == 0:
                    yield pb2.WatchInstancesResponse(synchronized=Empty())
                known -= 1
                change = await changes.get()
                if change.instance is None:
                    yield pb2.WatchInstancesResponse(removed=names.build("instances", change.removed))
                else:
                    yield pb2.WatchInstancesResponse(instance=convert.instance(change.instance))

    def _new(self, instance: str, deployment: str, model: str, engine: str, state: State) -> Instance:
        return Instance(instance, deployment, model, engine, state, self.instances.node.clock.now())

    def _engine_options(self, request: pb2.StartInstanceRequest) -> dict[str, Any]:
        """The options of the engine, as this node's version of it takes them."""
        engines.check_engine(request.engine)
        own = self.instances.node.settings.engine(request.engine)
        version = own.version if own else ""
        return engines.check_options(request.engine, from_struct(request.engine_options), version)

    def _begin(self, prefix: str, instance: str, request: Any, work: Any) -> operations_pb2.Operation:
        metadata = pb2.OperationMetadata(instance=names.build("instances", instance))
        metadata.create_time.CopyFrom(convert.timestamp(self.instances.node.clock.now()))
        operation = self.operations.start(prefix, work, metadata)
        living = {known.id for known in self.instances.all()}
        self._begun = {known: begun for known, begun in self._begun.items() if known in living}
        self._begun[instance] = (request.SerializeToString(deterministic=True), operation.name)
        return operation

    def _same(self, instance: str, request: Any) -> operations_pb2.Operation | None:
        """The operation that an identical request has begun before, if it is still known."""
        content, name = self._begun.get(instance, (b"", ""))
        if content != request.SerializeToString(deterministic=True):
            return None
        try:
            self.instances.get(instance)
            return self.operations.get(name)
        except NotFound:
            self._begun.pop(instance, None)
            return None

    def _watched(self, instance: str, progress: Progress) -> _Watched:
        return _Watched(self.observers, instance, progress)


class _Watched:
    """Show the steps of an instance's job as the stage of an operation while the context lasts."""

    def __init__(self, observers: Observers, instance: str, progress: Progress) -> None:
        self.observers = observers
        self.instance = instance
        self.progress = progress

    def __enter__(self) -> None:
        self.observers.stages[self.instance] = lambda stage: self.progress.update(stage=stage)

    def __exit__(self, *_: object) -> None:
        self.observers.stages.pop(self.instance, None)

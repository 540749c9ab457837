"""``InstanceService``: the instances of all nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from google.longrunning import operations_pb2
from google.protobuf.empty_pb2 import Empty

from controller import convert
from controller.core import Core
from controller.instances import Instances
from controller.migration import Destination, Migrations
from controller.model import Instance
from controller.ports import Removed, Synchronized
from controller.starts.starts import Starts
from dumont import names
from dumont.controller.v1 import instance_service_pb2 as pb
from dumont.controller.v1 import instance_service_pb2_grpc as pb_grpc
from dumont.errors import InvalidArgument
from dumont.rpc.operations import Operations, Progress
from dumont.rpc.pages import page
from dumont.rpc.streams import until_draining


class InstanceService(pb_grpc.InstanceServiceServicer):
    """``dumont.controller.v1.InstanceService``; the proto documents its methods.

    Args:
        core: the ports and the facts.
        instances: the commands to instances.
        migrations: what brings instances elsewhere.
        operations: the long-running operations of this service.
        draining: set when streams without an end of their own must end.
        starts: what knows why instances are where they are.
    """

    def __init__(
        self,
        core: Core,
        instances: Instances,
        migrations: Migrations,
        operations: Operations,
        draining: asyncio.Event,
        starts: Starts,
    ) -> None:
        self._core = core
        self._starts = starts
        self._inventory = core.inventory
        self._instances = instances
        self._migrations = migrations
        self._operations = operations
        self._draining = draining

    async def GetInstance(self, request: pb.GetInstanceRequest, context: object) -> pb.Instance:
        return self._message(self._inventory.instance(names.parse(request.name, "instances", "name")))

    async def ListInstances(
        self, request: pb.ListInstancesRequest, context: object
    ) -> pb.ListInstancesResponse:
        known = self._inventory.instances
        if request.deployment:
            deployment = names.parse(request.deployment, "deployments", "deployment")
            known = {instance.id: instance for instance in self._inventory.instances_of(deployment)}
        found, token = page(known, request.page_size, request.page_token)
        return pb.ListInstancesResponse(
            instances=[self._message(instance) for instance in found], next_page_token=token
        )

    async def WatchInstances(
        self, request: pb.WatchInstancesRequest, context: object
    ) -> AsyncGenerator[pb.WatchInstancesResponse]:
        async with aclosing(until_draining(self._inventory.watch(), self._draining)) as changes:
            async for change in changes:
                if isinstance(change, Removed):
                    yield pb.WatchInstancesResponse(removed=f"instances/{change.instance}")
                elif isinstance(change, Synchronized):
                    yield pb.WatchInstancesResponse(synchronized=Empty())
                else:
                    yield pb.WatchInstancesResponse(instance=self._message(change))

    async def ParkInstance(self, request: pb.ParkInstanceRequest, context: object) -> pb.Instance:
        return self._message(await self._instances.park(names.parse(request.name, "instances", "name")))

    async def ResumeInstance(self, request: pb.ResumeInstanceRequest, context: object) -> pb.Instance:
        return self._message(await self._instances.resume(names.parse(request.name, "instances", "name")))

    async def MigrateInstance(
        self, request: pb.MigrateInstanceRequest, context: object
    ) -> operations_pb2.Operation:
        instance = names.parse(request.name, "instances", "name")
        node = names.parse(request.node, "nodes", "node") if request.node else ""
        to = Destination(node, request.gpu, request.cold)
        self._migrations.check(instance, to)

        async def work(progress: Progress) -> pb.Instance:
            def on_stage(stage: str) -> None:
                progress.update(stage=stage)

            return self._message(await self._migrations.migrate(instance, to, on_stage))

        metadata = pb.MigrateInstanceMetadata(
            instance=f"instances/{instance}", create_time=convert.timestamp(self._core.clock.moment().wall)
        )
        return await self._operations.begin("migrate", work, metadata)

    async def StopInstance(self, request: pb.StopInstanceRequest, context: object) -> Empty:
        # A person may end an instance that hangs in a request; only the timers wait for requests to end.
        await self._instances.stop(names.parse(request.name, "instances", "name"), force=True)
        return Empty()

    async def StreamInstanceLogs(
        self, request: pb.StreamInstanceLogsRequest, context: object
    ) -> AsyncGenerator[pb.StreamInstanceLogsResponse]:
        instance = self._inventory.instance(names.parse(request.name, "instances", "name"))
        if request.tail_lines < 0:
            raise InvalidArgument(
                "NEGATIVE_TAIL_LINES", "tail_lines must not be negative", field="tail_lines"
            )
        self._core.fleet.check_reachable(instance.node)
        logs = self._core.nodes.stream_logs(instance.node, instance.id, request.tail_lines, request.follow)
        async with aclosing(logs), aclosing(until_draining(logs, self._draining)) as lines:
            async for data in lines:
                yield pb.StreamInstanceLogsResponse(data=data)

    def _message(self, instance: Instance) -> pb.Instance:
        deployments = self._core.deployments
        owner = deployments.by_id.get(instance.deployment)
        orphan = owner is None or not owner.runs(instance.report)
        return convert.instance_message(
            instance,
            deployments.last_use.get(instance.deployment),
            orphan,
            self._starts.reasons(instance),
        )

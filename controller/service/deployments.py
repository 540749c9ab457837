"""``DeploymentService``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from google.protobuf.empty_pb2 import Empty

from controller import convert
from controller.core import Core
from controller.model import Deployment
from controller.starts import progress
from controller.starts.starts import Starts
from dumont import names
from dumont.controller.v1 import deployment_service_pb2 as pb
from dumont.controller.v1 import deployment_service_pb2_grpc as pb_grpc
from dumont.rpc.pages import page
from dumont.rpc.streams import until_draining

MOST_CANDIDATES = 100


class DeploymentService(pb_grpc.DeploymentServiceServicer):
    """``dumont.controller.v1.DeploymentService``; the proto documents its methods.

    Args:
        core: the ports and the facts.
        starts: the starts of deployments.
        draining: set when streams without an end of their own must end.
    """

    def __init__(self, core: Core, starts: Starts, draining: asyncio.Event | None = None) -> None:
        self._core = core
        self._draining = draining or asyncio.Event()
        self._deployments = core.deployments
        self._inventory = core.inventory
        self._starts = starts

    async def CreateDeployment(self, request: pb.CreateDeploymentRequest, context: object) -> pb.Deployment:
        identifier = names.check_id(request.deployment_id, "deployment_id")
        draft = convert.draft(request.deployment)
        created = await self._deployments.create(identifier, draft, convert.request_id(request.request_id))
        membership = self._core.membership
        if request.prewarm and membership.holder(created.id) == membership.number:
            # What another controller holds was created by the same request before, and is started there.
            self._starts.begin(created.id)
        return self._message(created)

    async def GetDeployment(self, request: pb.GetDeploymentRequest, context: object) -> pb.Deployment:
        return self._message(self._deployments.get(names.parse(request.name, "deployments", "name")))

    async def ListDeployments(
        self, request: pb.ListDeploymentsRequest, context: object
    ) -> pb.ListDeploymentsResponse:
        found, token = page(self._deployments.by_id, request.page_size, request.page_token)
        return pb.ListDeploymentsResponse(
            deployments=[self._message(deployment) for deployment in found], next_page_token=token
        )

    async def UpdateDeployment(self, request: pb.UpdateDeploymentRequest, context: object) -> pb.Deployment:
        identifier = names.parse(request.deployment.name, "deployments", "deployment.name")
        old = self._deployments.get(identifier)
        paths = convert.paths(request)
        merged = convert.overlay(old, request.deployment, paths)
        updated = await self._deployments.update(
            identifier, convert.draft(merged), paths, request.deployment.etag
        )
        if request.prewarm:
            self._starts.begin(identifier)
        return self._message(updated)

    async def WatchStart(
        self, request: pb.WatchStartRequest, context: object
    ) -> AsyncGenerator[pb.WatchStartResponse]:
        identifier = self._deployments.get(names.parse(request.name, "deployments", "name")).id
        changes = progress.watch(self._core, self._starts, identifier)
        async with aclosing(changes), aclosing(until_draining(changes, self._draining)) as told:
            async for found in told:
                yield pb.WatchStartResponse(
                    running=found.running,
                    stage=found.stage,
                    instance=convert.full_name("instances", found.instance),
                    node=convert.full_name("nodes", found.node),
                    snapshot=convert.full_name("snapshots", found.snapshot),
                )

    async def DeleteDeployment(self, request: pb.DeleteDeploymentRequest, context: object) -> Empty:
        identifier = names.parse(request.name, "deployments", "name")
        await self._deployments.begin_delete(identifier)
        await self._starts.cancel(identifier)
        await self._inventory.until(
            lambda: identifier not in self._deployments.by_id, f"deployments/{identifier}"
        )
        return Empty()

    async def ExplainDeployment(
        self, request: pb.ExplainDeploymentRequest, context: object
    ) -> pb.ExplainDeploymentResponse:
        decision, candidates = self._starts.explain(names.parse(request.name, "deployments", "name"))
        return pb.ExplainDeploymentResponse(
            decision=decision, candidates=map(convert.candidate_message, candidates[:MOST_CANDIDATES])
        )

    def _message(self, deployment: Deployment) -> pb.Deployment:
        state, message = self._starts.condition(deployment)
        return convert.deployment_message(
            deployment, state, message, self._deployments.last_use.get(deployment.id)
        )

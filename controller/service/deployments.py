"""``DeploymentService``."""

from __future__ import annotations

from google.protobuf.empty_pb2 import Empty

from controller import convert
from controller.catalogue import Catalogue
from controller.inventory import Inventory
from controller.model import Deployment
from controller.paging import page
from controller.starter import Starter
from dumont import names
from dumont.controller.v1 import deployment_service_pb2 as pb
from dumont.controller.v1 import deployment_service_pb2_grpc as pb_grpc


class DeploymentService(pb_grpc.DeploymentServiceServicer):
    def __init__(self, catalogue: Catalogue, starter: Starter, inventory: Inventory) -> None:
        self._catalogue = catalogue
        self._starter = starter
        self._inventory = inventory

    async def CreateDeployment(self, request: pb.CreateDeploymentRequest, context: object) -> pb.Deployment:
        identifier = names.check_id(request.deployment_id, "deployment_id")
        draft = convert.draft(request.deployment)
        created = await self._catalogue.create(identifier, draft, convert.request_id(request.request_id))
        if request.prewarm:
            self._starter.begin(created.id)
        return self._message(created)

    async def GetDeployment(self, request: pb.GetDeploymentRequest, context: object) -> pb.Deployment:
        return self._message(self._catalogue.get(names.parse(request.name, "deployments", "name")))

    async def ListDeployments(
        self, request: pb.ListDeploymentsRequest, context: object
    ) -> pb.ListDeploymentsResponse:
        found, token = page(self._catalogue.deployments, request.page_size, request.page_token)
        return pb.ListDeploymentsResponse(
            deployments=[self._message(deployment) for deployment in found], next_page_token=token
        )

    async def UpdateDeployment(self, request: pb.UpdateDeploymentRequest, context: object) -> pb.Deployment:
        identifier = names.parse(request.deployment.name, "deployments", "deployment.name")
        old = self._catalogue.get(identifier)
        paths = convert.paths(request)
        merged = convert.overlay(old, request.deployment, paths)
        updated = await self._catalogue.update(
            identifier, convert.draft(merged), paths, request.deployment.etag
        )
        return self._message(updated)

    async def DeleteDeployment(self, request: pb.DeleteDeploymentRequest, context: object) -> Empty:
        identifier = names.parse(request.name, "deployments", "name")
        await self._catalogue.begin_delete(identifier)
        await self._starter.cancel(identifier)
        await self._inventory.until(lambda: identifier not in self._catalogue.deployments)
        return Empty()

    def _message(self, deployment: Deployment) -> pb.Deployment:
        state, message = self._starter.condition(deployment)
        return convert.deployment(deployment, state, message, self._catalogue.last_use.get(deployment.id))

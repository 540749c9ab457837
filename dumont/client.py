"""The asynchronous client. ``dumont.sync`` wraps it for callers without an event loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from operator import attrgetter
from types import TracebackType
from typing import Any, Self, Unpack

from google.protobuf.field_mask_pb2 import FieldMask

from dumont import arguments, convert, starting
from dumont.arguments import Checkpoint, DeploySettings, GenerateOptions, full_name
from dumont.connection import Connection
from dumont.controller.v1 import deployment_service_pb2
from dumont.errors import AlreadyExists, FailedPrecondition
from dumont.resources import AsyncInstances, AsyncNodes, AsyncSnapshots, pages
from dumont.rpc.structs import from_struct
from dumont.starting import OnProgress, following
from dumont.stream import AsyncTextStream
from dumont.types import DeploymentInfo, Explanation, Generation


class AsyncClient:
    """A client of one controller, for use within an event loop.

    ``deploy`` makes or finds a deployment; ``deployments``, ``instances``, ``snapshots`` and ``nodes`` show
    and change what there is. Every method raises a ``DumontError`` when it cannot do what it says. Names
    are taken with or without their collection: ``"qa"`` or ``"deployments/qa"``.

    Args:
        endpoint: ``host:port`` or ``unix:path`` of the controller; ``DUMONT_ENDPOINT`` when left out, else
            ``localhost:7070``.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self._connection = Connection(endpoint)
        self.endpoint = self._connection.endpoint
        self.deployments = AsyncDeployments(self._connection)
        self.instances = AsyncInstances(self._connection)
        self.snapshots = AsyncSnapshots(self._connection)
        self.nodes = AsyncNodes(self._connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End running calls and disconnect."""
        await self._connection.close()

    async def deploy(
        self,
        model: str | os.PathLike[str],
        start_mode: str | None = None,
        checkpoint: Checkpoint | None = None,
        **settings: Unpack[DeploySettings],
    ) -> AsyncDeployment:
        """Serve a model, or change how it is served; see ``dumont.deploy``."""
        arguments.check_options(settings, DeploySettings.__annotations__, "deploy")
        return await self.deployments.deploy(model, start_mode, checkpoint, **settings)


class AsyncDeployment:
    """A deployed model. ``info`` is what the controller last said of it; ``refresh()`` asks again."""

    def __init__(self, connection: Connection, info: DeploymentInfo) -> None:
        self._connection = connection
        self.info = info

    @property
    def name(self) -> str:
        """``deployments/{id}``."""
        return self.info.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.info.model} {self.info.state}>"

    async def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """The whole answer to a prompt or to ``messages``. The model is started first if it has no instance.

        Args:
            prompt: text to continue, as it is.
            options: see ``GenerateOptions``.
        """
        return await self.stream(prompt, **options).collect()

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncTextStream:
        """The answer in pieces, as it is written. Takes the arguments of ``generate``."""
        request = arguments.generate_request(self.name, prompt, **options)
        timeout = arguments.to_timeout(options.get("timeout"))
        return AsyncTextStream(self._connection, request, timeout, options.get("progress"))

    async def embed(
        self,
        inputs: str | Iterable[str],
        *,
        timeout: arguments.Seconds | None = None,
        progress: OnProgress | None = None,
    ) -> list[list[float]]:
        """One vector for each text, in order; a single string gives a list of one.

        Args:
            inputs: one text or several.
            timeout: seconds for the whole answer, including a start.
            progress: called at each step of a start, if one is needed.
        """
        request = arguments.embed_request(self.name, inputs)
        within = arguments.to_timeout(timeout)
        arguments.check_callback(progress, "progress")
        told = following(self._connection, self.name, progress)
        try:
            with self._connection.errors(within):
                response = await self._connection.inference.Embed(request, timeout=within)
        finally:
            told.cancel()
        return [list(embedding.values) for embedding in response.embeddings]

    async def started(self, progress: OnProgress | None = None) -> DeploymentInfo:
        """Wait until no start of the deployment is under way.

        Args:
            progress: called at each step.

        Raises:
            FailedPrecondition: START_FAILED, the start has failed.
        """
        arguments.check_callback(progress, "progress")
        async with aclosing(starting.watch(self._connection, self.name)) as changes:
            async for found in changes:
                if not found.running:
                    break
                if progress:
                    progress(found)
        info = await self.refresh()
        if info.state == "degraded":
            raise FailedPrecondition(
                "START_FAILED", f"{self.name}: {info.state_message}", metadata={"deployment": self.name}
            )
        return info

    async def refresh(self) -> DeploymentInfo:
        """Ask the controller for ``info`` again."""
        request = deployment_service_pb2.GetDeploymentRequest(name=self.name)
        with self._connection.errors():
            self.info = convert.deployment(await self._connection.deployments.GetDeployment(request))
        return self.info

    async def explain(self) -> Explanation:
        """What a request that arrived now would do, and why; see ``Explanation``."""
        request = deployment_service_pb2.ExplainDeploymentRequest(name=self.name)
        with self._connection.errors():
            return convert.explanation(await self._connection.deployments.ExplainDeployment(request))

    async def delete(self) -> None:
        """End the deployment's instances, delete its snapshots and remove it."""
        request = deployment_service_pb2.DeleteDeploymentRequest(name=self.name)
        with self._connection.errors():
            await self._connection.deployments.DeleteDeployment(request)


class AsyncDeployments:
    """The deployments of a controller."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def deploy(
        self,
        model: str | os.PathLike[str],
        start_mode: str | None = None,
        checkpoint: Checkpoint | None = None,
        *,
        name: str | None = None,
        engine: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        idle_timeout: arguments.Seconds | None = None,
        park_timeout: arguments.Seconds | None = None,
        prewarm: bool = False,
        priority: int | None = None,
        min_instances: int | None = None,
        max_instances: int | None = None,
        wait: bool = False,
        progress: OnProgress | None = None,
    ) -> AsyncDeployment:
        """Serve a model, or change how it is served; see ``dumont.deploy``."""
        wanted, paths = arguments.deployment_message(
            model, start_mode, checkpoint,
            engine=engine, engine_options=engine_options,
            idle_timeout=idle_timeout, park_timeout=park_timeout,
            priority=priority, min_instances=min_instances, max_instances=max_instances,
        )  # fmt: skip
        wanted.name = full_name(name or arguments.deployment_id(model), "deployments", "name")
        arguments.check_callback(progress, "progress")
        # To wait for a start without one would be to wait for somebody's request.
        prewarm = prewarm or bool(wait)
        try:
            deployment = self._handle(await self._create(wanted, prewarm))
        except AlreadyExists:
            deployment = self._handle(await self._adopt(wanted, paths, prewarm))
        if wait:
            await deployment.started(progress)
        return deployment

    async def get(self, name: str) -> AsyncDeployment:
        """The deployment of this name."""
        return self._handle(await self._get(full_name(name, "deployments", "name")))

    async def delete(self, name: str) -> None:
        """End a deployment's instances, delete its snapshots and remove it."""
        request = deployment_service_pb2.DeleteDeploymentRequest(name=full_name(name, "deployments", "name"))
        with self._connection.errors():
            await self._connection.deployments.DeleteDeployment(request)

    async def _get(self, name: str) -> deployment_service_pb2.Deployment:
        request = deployment_service_pb2.GetDeploymentRequest(name=name)
        with self._connection.errors():
            return await self._connection.deployments.GetDeployment(request)

    async def _create(
        self, wanted: deployment_service_pb2.Deployment, prewarm: bool
    ) -> deployment_service_pb2.Deployment:
        request = arguments.request(
            deployment_service_pb2.CreateDeploymentRequest,
            deployment_id=wanted.name.removeprefix("deployments/"),
            deployment=wanted,
            prewarm=prewarm,
        )
        with self._connection.errors():
            return await self._connection.deployments.CreateDeployment(request)

    async def _adopt(
        self, wanted: deployment_service_pb2.Deployment, paths: list[str], prewarm: bool
    ) -> deployment_service_pb2.Deployment:
        """The existing deployment of the wanted name, with its settings changed to the wanted ones."""
        existing = await self._get(wanted.name)
        for field in ("model", "engine"):
            want, have = getattr(wanted, field), getattr(existing, field)
            if want and want != have:
                raise AlreadyExists(
                    f"DEPLOYMENT_{field.upper()}_DIFFERS",
                    f"{wanted.name} exists and serves {field} {have}, not {want}; "
                    "give the new one another name, or delete the old one first",
                    field=field,
                    metadata={"deployment": wanted.name, "existing": have, "wanted": want},
                )
        want_options, have_options = map(from_struct, (wanted.engine_options, existing.engine_options))
        if want_options and want_options != have_options:
            raise AlreadyExists(
                "DEPLOYMENT_ENGINE_OPTIONS_DIFFER",
                f"{wanted.name} exists with the engine options {have_options}, not {want_options}; give the "
                "new one another name, or delete the old one first",
                field="engine_options",
                metadata={"deployment": wanted.name},
            )
        changed = [path for path in paths if attrgetter(path)(wanted) != attrgetter(path)(existing)]
        if not changed and not prewarm:
            return existing
        request = arguments.request(
            deployment_service_pb2.UpdateDeploymentRequest,
            deployment=wanted,
            # An empty mask would mean every field; the name is one that never changes.
            update_mask=FieldMask(paths=changed or ["name"]),
            prewarm=prewarm,
        )
        with self._connection.errors():
            return await self._connection.deployments.UpdateDeployment(request)

    def _handle(self, message: deployment_service_pb2.Deployment) -> AsyncDeployment:
        return AsyncDeployment(self._connection, convert.deployment(message))

    async def list(self) -> list[AsyncDeployment]:
        """All deployments."""
        request = deployment_service_pb2.ListDeploymentsRequest()
        return [
            self._handle(message)
            async for message in pages(
                self._connection, self._connection.deployments.ListDeployments, request, "deployments"
            )
        ]

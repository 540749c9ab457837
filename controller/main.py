"""``dumont-controller``: reads the settings, wires the parts and serves."""

from __future__ import annotations

import asyncio
import sys
import uuid
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import grpc
import structlog
import uvloop
from prometheus_client import start_http_server

from controller import config
from controller.adapters import identity_file
from controller.adapters.clock import SystemClock
from controller.adapters.nodes_grpc import GrpcNodes
from controller.adapters.registry_sql import SqlRegistry, open_registry
from controller.assembly import Controller, assemble
from controller.config import Config
from controller.identity import Established, establish
from controller.service.deployments import DeploymentService
from controller.service.inference import SERVICE as INFERENCE_SERVICE
from controller.service.inference import InferenceService
from controller.service.instances import InstanceService
from controller.service.nodes import NodeService
from controller.service.snapshots import SnapshotService
from dumont.controller.v1 import (
    deployment_service_pb2_grpc,
    instance_service_pb2_grpc,
    node_service_pb2_grpc,
    snapshot_service_pb2_grpc,
)
from dumont.errors import DumontError, FailedPrecondition
from dumont.rpc import operations
from dumont.rpc.logs import configure_logs
from dumont.rpc.operations import Operations
from dumont.rpc.server import (
    Health,
    ServerLimits,
    add_standard_services,
    bind,
    new_server,
    run_until_signalled,
)
from dumont.state_directory import locked, make_private

DOMAIN = "controller.dumont"
SERVICES = (
    "dumont.controller.v1.DeploymentService",
    INFERENCE_SERVICE,
    "dumont.controller.v1.InstanceService",
    "dumont.controller.v1.NodeService",
    "dumont.controller.v1.SnapshotService",
    operations.SERVICE_NAME,
)
# A batch of embeddings is larger than gRPC's usual 4 MiB.
LIMITS = ServerLimits(max_message_bytes=64 * 1024 * 1024)

log = structlog.get_logger()


def add_services(
    server: grpc.aio.Server,
    controller: Controller,
    running: Operations,
    settings: Config,
    draining: asyncio.Event,
) -> None:
    """Register every service of the API. Streams without an end of their own end when ``draining`` is set."""
    deployment_service_pb2_grpc.add_DeploymentServiceServicer_to_server(
        DeploymentService(controller.core, controller.starts), server
    )
    InferenceService(controller.serving, settings.max_new_tokens, LIMITS.write_seconds).register(server)
    instance_service_pb2_grpc.add_InstanceServiceServicer_to_server(
        InstanceService(controller.core, controller.instances, controller.migrations, running, draining),
        server,
    )
    node_service_pb2_grpc.add_NodeServiceServicer_to_server(
        NodeService(controller.core, controller.migrations, running, settings.heartbeat_seconds), server
    )
    snapshot_service_pb2_grpc.add_SnapshotServiceServicer_to_server(
        SnapshotService(controller.core, controller.snapshots, controller.starts, running), server
    )
    running.register(server)


async def serve(settings: Config) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        DumontError: the address or the database cannot be used.
    """
    state_dir = settings.state_dir.expanduser()
    await asyncio.to_thread(make_private, state_dir)
    with locked(state_dir / "lock", "dumont-controller", settings.listen), _database_locked(settings):
        await _serve(settings, state_dir)


async def _serve(settings: Config, state_dir: Path) -> None:
    server = new_server(DOMAIN, LIMITS)
    health = add_standard_services(server, SERVICES)
    # The address is taken before the database is touched: a second controller stops here.
    address = bind(server, settings.listen, insecure_ok=settings.insecure)
    registry = await open_registry(settings.database_url)
    try:
        await registry.lock(settings.listen)
        await _serve_registry(settings, state_dir, server, health, address, registry)
    finally:
        await registry.close()


async def _serve_registry(
    settings: Config,
    state_dir: Path,
    server: grpc.aio.Server,
    health: Health,
    address: str,
    registry: SqlRegistry,
) -> None:
    established = await _establish(settings, state_dir, registry)
    nodes = GrpcNodes(established.identity.id)
    running = Operations(DOMAIN)
    controller = await assemble(
        nodes,
        registry,
        SystemClock(),
        established,
        settings.heartbeat_seconds,
        settings.max_queue,
        settings.prune_seconds,
    )
    try:
        add_services(server, controller, running, settings, health.draining)
        if settings.metrics_listen:
            _serve_metrics(settings.metrics_listen, controller)
        await server.start()
        await health.set_all(True)
        log.info("serving", address=address)
        await run_until_signalled(server, health, settings.drain_seconds)
    finally:
        await running.close()
        await controller.close()
        await nodes.close()
        log.info("stopped")


async def _establish(settings: Config, state_dir: Path, registry: SqlRegistry) -> Established:
    """Decide which controller this is, and record it in the database and in the state directory."""
    stored = await registry.load()
    established = establish(
        await registry.identity(),
        identity_file.read(state_dir),
        empty=not (stored.deployments or stored.nodes),
        wanted=settings.controller_id,
        accept=settings.accept_database,
        new_id=str(uuid.uuid4()),
    )
    await registry.save_identity(established.identity)
    identity_file.write(state_dir, established.identity)
    if established.outdated:
        log.warning(
            "database_outdated", controller=established.identity.id, starts=established.identity.starts
        )
    return established


def _database_locked(settings: Config) -> AbstractContextManager[None]:
    """Lock the SQLite file too: a controller with another state directory may name the same file."""
    path = settings.database_file
    if path is None:
        return nullcontext()
    return locked(path.with_name(f"{path.name}.lock"), "dumont-controller", settings.listen)


def main() -> None:
    """The console script."""
    try:
        settings = config.load(sys.argv[1:])
        configure_logs(settings.log_format, settings.log_level)
        uvloop.run(serve(settings))
    except DumontError as error:
        sys.exit(f"dumont-controller: {error.message}")


def _serve_metrics(address: str, controller: Controller) -> None:
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host or "127.0.0.1", controller.core.metrics.registry)
    except (OSError, OverflowError) as error:
        raise FailedPrecondition(
            "ADDRESS_UNUSABLE",
            f"metrics cannot be served on {address}: {error}; choose another --metrics-listen",
            metadata={"address": address},
        ) from error


if __name__ == "__main__":
    main()

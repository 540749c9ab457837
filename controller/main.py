"""``dumont-controller``: reads the settings, wires the parts and serves."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import grpc
import structlog
import uvloop
from prometheus_client import start_http_server

from controller import config
from controller.adapters import identity_file
from controller.adapters.clock import SystemClock
from controller.adapters.nodes_grpc import GrpcNodes
from controller.adapters.operation_store import OperationStore
from controller.adapters.registry_sql import SqlRegistry, open_registry
from controller.assembly import Controller, assemble
from controller.config import Config
from controller.identity import Established, Identity, establish
from controller.membership import Membership
from controller.service.deployments import DeploymentService
from controller.service.forwarding import ForwardingInterceptor
from controller.service.inference import SERVICE as INFERENCE_SERVICE
from controller.service.inference import InferenceService
from controller.service.instances import InstanceService
from controller.service.nodes import NodeService
from controller.service.snapshots import SnapshotService
from dumont import limits
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
# Requests that are too large for a node are refused in our words, not in gRPC's.
LIMITS = ServerLimits(max_message_bytes=16 * limits.MESSAGE_BYTES)

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
        DeploymentService(controller.core, controller.starts, draining), server
    )
    InferenceService(controller.serving, settings.max_new_tokens, LIMITS.write_seconds).register(server)
    instance_service_pb2_grpc.add_InstanceServiceServicer_to_server(
        InstanceService(
            controller.core, controller.instances, controller.migrations, running, draining, controller.starts
        ),
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
        surpassed = 0
        while (ended := await _serve(settings, state_dir, surpassed)) is not None:
            # What it knew may be outdated, so it starts as a new process would.
            surpassed = ended


async def _serve(settings: Config, state_dir: Path, surpassed: int) -> int | None:
    """Serve until a signal, or until the session has ended.

    Args:
        settings: of the process.
        state_dir: the state directory.
        surpassed: the new session must have a higher number.

    Returns:
        The same for the next session; None: a signal has come.
    """
    forwarding = ForwardingInterceptor(3 * settings.lease_seconds, LIMITS.write_seconds)
    server = new_server(DOMAIN, LIMITS, (forwarding,))
    health = add_standard_services(server, SERVICES)
    # The address is taken before the database is touched: a second controller stops here.
    address = bind(server, settings.listen, insecure_ok=settings.insecure)
    async with AsyncExitStack() as stack:
        registry = await open_registry(settings.database_url)
        stack.push_async_callback(registry.close)
        established = await _join(settings, state_dir, registry, settings.reached_at(address), surpassed)
        membership = Membership(established.identity.starts)
        nodes = GrpcNodes(
            established.identity.id,
            membership.number,
            lambda: membership.sessions,
            lambda newer: membership.end(newer),
        )
        stack.push_async_callback(nodes.close)
        controller = await assemble(
            nodes,
            registry,
            SystemClock(),
            established,
            settings.heartbeat_seconds,
            settings.max_queue,
            settings.prune_seconds,
            settings.lease_seconds,
            membership,
            settings.rebalance,
            settings.yield_seconds,
        )
        stack.push_async_callback(controller.close)
        running = Operations(DOMAIN, store=OperationStore(registry))
        stack.push_async_callback(running.close)
        stack.push_async_callback(forwarding.close)
        if settings.shared:
            forwarding.attach(controller)
        add_services(server, controller, running, settings, health.draining)
        if settings.metrics_listen:
            stack.callback(_serve_metrics(settings.metrics_listen, controller))
        await server.start()
        await health.set_all(True)
        log.info("serving", address=address, controller=established.identity.id, session=membership.number)
        signalled = await _until_signalled_or(membership.ended, server, health, settings.drain_seconds)
    log.info("stopped")
    return None if signalled else membership.surpassed


async def _until_signalled_or(
    ended: asyncio.Event, server: grpc.aio.Server, health: Health, drain_seconds: float
) -> bool:
    """Serve until a signal comes, or the session has ended. Returns whether it was a signal."""
    run = asyncio.ensure_future(run_until_signalled(server, health, drain_seconds))
    over = asyncio.ensure_future(ended.wait())
    await asyncio.wait({run, over}, return_when=asyncio.FIRST_COMPLETED)
    over.cancel()
    if health.draining.is_set():
        await run
        return True
    log.error("session_ended", remedy="another controller has taken its place; it begins a new session")
    run.cancel()
    health.draining.set()
    # Streams of answers would come from instances that are another controller's by now.
    await server.stop(0)
    return False


async def _join(
    settings: Config, state_dir: Path, registry: SqlRegistry, address: str, surpassed: int
) -> Established:
    """Decide which fleet this is, and begin a session in it; the state directory remembers both."""
    remembered = await asyncio.to_thread(identity_file.read, state_dir)
    new_id = str(uuid.uuid4())

    def decide(stored: Identity | None, empty: bool) -> Established:
        established = establish(
            stored,
            remembered,
            empty=empty,
            wanted=settings.controller_id,
            accept=settings.accept_database,
            new_id=new_id,
        )
        starts = max(established.identity.starts, surpassed + 1)
        return replace(established, identity=replace(established.identity, starts=starts))

    established = await registry.join(decide, address, settings.lease_seconds)
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


def _serve_metrics(address: str, controller: Controller) -> Callable[[], None]:
    """Serve the Prometheus page; returns what ends that."""
    host, _, port = address.rpartition(":")
    try:
        page, thread = start_http_server(int(port), host or "127.0.0.1", controller.core.metrics.registry)
    except (OSError, OverflowError) as error:
        raise FailedPrecondition(
            "ADDRESS_UNUSABLE",
            f"metrics cannot be served on {address}: {error}; choose another --metrics-listen",
            metadata={"address": address},
        ) from error

    def end() -> None:
        page.shutdown()
        page.server_close()
        thread.join()

    return end


if __name__ == "__main__":
    main()

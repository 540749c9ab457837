"""The daemon: reads its settings, has its parts assembled, and serves."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack

import structlog
import uvloop
from prometheus_client import start_http_server
from pydantic import ValidationError
from pydantic_settings import CliApp

from dumont.errors import DumontError, FailedPrecondition
from dumont.rpc import operations as rpc_operations
from dumont.rpc.logs import configure_logs
from dumont.rpc.server import ServerLimits, add_standard_services, bind, new_server, run_until_signalled
from dumont.snapshotd.v1 import instance_service_pb2_grpc, node_service_pb2_grpc, snapshot_service_pb2_grpc
from snapshotd import preflight
from snapshotd.adapters.registration import keep_registered
from snapshotd.assembly import assemble, budgets, check_repository
from snapshotd.config import Settings, node_id
from snapshotd.failpoints import Failpoints
from snapshotd.instances.load import follow_load
from snapshotd.jobs.context import Node
from snapshotd.model import Finding
from snapshotd.service.inference import Inference
from snapshotd.service.instances import InstanceServicer
from snapshotd.service.node import NodeServicer
from snapshotd.service.ownership import Ownership, OwnershipInterceptor
from snapshotd.service.snapshots import SnapshotServicer
from snapshotd.system import malloc

log = structlog.get_logger(__name__)

DOMAIN = "snapshotd.dumont"
SERVICES = tuple(
    f"dumont.snapshotd.v1.{name}"
    for name in ("InferenceService", "InstanceService", "SnapshotService", "NodeService")
)


# After the time for running calls: what is not finished then is left to the next daemon.
CLEAN_UP_SECONDS = 10.0
# The same where all instances are to be stopped as well.
STOP_SECONDS = 60.0
# EX_TEMPFAIL of sysexits.h.
EXIT_HUNG = 75


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        FailedPrecondition: this machine, the state directory or the address cannot be used.
    """
    criu, findings = preflight.find_criu()
    findings = [*preflight.check_machine(gpu=settings.device != "cpu"), *findings]
    problems = preflight.problems(findings)
    if criu is None or problems:
        raise FailedPrecondition("MACHINE_UNFIT", "; ".join(problems))
    async with AsyncExitStack() as stack:
        parts = assemble(settings, criu, Failpoints.parse(settings.failpoints), stack)
        instances, remote = parts.instances, parts.snapshots.remote
        if remote is not None:
            await check_repository(remote.repository)
        operations = rpc_operations.Operations(DOMAIN)
        inference = Inference(instances)
        findings += unsuspendable(parts.node, findings)
        node_servicer = NodeServicer(
            instances,
            node_id(settings),
            findings,
            budgets(settings, parts.weights),
            settings.store_url,
            parts.weights.cached_bytes,
        )

        ownership = Ownership(settings.state_dir / "controller")
        server = new_server(DOMAIN, ServerLimits(), (OwnershipInterceptor(ownership),))
        health = add_standard_services(server, (*SERVICES, rpc_operations.SERVICE_NAME))
        server.add_generic_rpc_handlers((inference.handler(),))
        instance_service_pb2_grpc.add_InstanceServiceServicer_to_server(
            InstanceServicer(instances, parts.snapshots, operations, parts.observers, health.draining), server
        )
        snapshot_service_pb2_grpc.add_SnapshotServiceServicer_to_server(
            SnapshotServicer(parts.node, parts.snapshots, operations), server
        )
        node_service_pb2_grpc.add_NodeServiceServicer_to_server(node_servicer, server)
        operations.register(server)
        endpoint = bind(server, settings.listen)

        if settings.stop_instances_on_exit:
            stack.push_async_callback(instances.stop_all)
        stack.push_async_callback(instances.detach)
        if remote is not None:
            stack.push_async_callback(remote.uploads.close)
            stack.push_async_callback(parts.snapshots.close)
        await parts.start()
        load = asyncio.create_task(follow_load(instances), name="follow load")
        stack.callback(load.cancel)
        stack.push_async_callback(inference.close)
        stack.push_async_callback(operations.close)
        await server.start()
        await health.set_all(True)
        if settings.metrics_listen:
            serve_metrics(settings.metrics_listen)
        log.info("snapshotd_serving", endpoint=endpoint, node=node_servicer.node_id, criu=criu.version)
        for controller in filter(None, (name.strip() for name in settings.controller.split(","))):
            registration = asyncio.create_task(
                keep_registered(
                    controller,
                    settings.advertise or endpoint,
                    node_servicer.node_id,
                    node_servicer.describe,
                    settings.heartbeat_seconds,
                    ownership,
                    settings.accept_controller,
                )
            )
            stack.callback(registration.cancel)
        watch = asyncio.create_task(instances.watch_weights(), name="watch weights")
        stack.callback(watch.cancel)
        await run_until_signalled(server, health, settings.drain_seconds)
        end_within(STOP_SECONDS if settings.stop_instances_on_exit else CLEAN_UP_SECONDS)


def unsuspendable(node: Node, findings: Sequence[Finding]) -> list[Finding]:
    """Why CUDA processes cannot be suspended on this node, unless another finding says so already."""
    if node.gpus is None or node.gpus.cuda is not None or not all(finding.passed for finding in findings):
        return []
    return [Finding("cuda_backend", False, node.gpus.unsuspendable, needed=False)]


def end_within(seconds: float) -> None:
    """End this process after some time, whatever it still waits for. The instances go on.

    A thread that reads from a hanging mount cannot be ended, and the interpreter would wait for it.
    """

    def end() -> None:
        log.error("clean_up_hangs", seconds=seconds, remedy="see what its threads wait for")
        os._exit(EXIT_HUNG)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def serve_metrics(address: str) -> None:
    """Serve the Prometheus page at ``address``, host:port.

    Raises:
        FailedPrecondition: ADDRESS_UNUSABLE.
    """
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host or "127.0.0.1")
    except (OSError, OverflowError, ValueError) as error:
        raise FailedPrecondition(
            "ADDRESS_UNUSABLE",
            f"metrics cannot be served on {address}: {error}; choose another --metrics-listen",
            metadata={"address": address},
        ) from error


def main() -> None:
    """The command ``dumont-snapshotd``."""
    try:
        settings = CliApp.run(Settings)
        configure_logs(settings.log_format)
        malloc.give_back_large_blocks()
        uvloop.run(run(settings))
    except ValidationError as error:
        raise SystemExit(f"dumont-snapshotd: {error}") from None
    except DumontError as error:
        raise SystemExit(f"dumont-snapshotd: {error.message} ({error.reason})") from None
    except ValueError as error:
        raise SystemExit(f"dumont-snapshotd: {error}") from None


if __name__ == "__main__":
    main()

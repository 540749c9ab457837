"""Tell the controller that this node exists, and keep telling it."""

from __future__ import annotations

import asyncio

import grpc
import structlog

from dumont import names
from dumont.controller.v1 import node_service_pb2 as pb2
from dumont.controller.v1 import node_service_pb2_grpc as pb2_grpc
from dumont.rpc.status import from_rpc_error
from snapshotd.service.node import NodeServicer
from snapshotd.service.ownership import Ownership

log = structlog.get_logger(__name__)

CALL_TIMEOUT = 5.0
RETRY_SECONDS = 1.0


async def keep_registered(
    controller: str,
    endpoint: str,
    node: NodeServicer,
    heartbeat_seconds: float,
    ownership: Ownership,
    accept: bool = False,
) -> None:
    """Register with ``controller`` and send heartbeats, for ever; a lost controller is tried again.

    Args:
        controller: its address.
        endpoint: where the node is reached.
        node: what is told of it.
        heartbeat_seconds: between heartbeats, unless the controller says otherwise.
        ownership: the controller that the node belongs to.
        accept: belong to whichever controller answers at that address.
    """
    async with grpc.aio.insecure_channel(controller) as channel:
        stub: pb2_grpc.NodeServiceAsyncStub = pb2_grpc.NodeServiceStub(channel)
        registered = False
        while True:
            try:
                if registered:
                    await _heartbeat(stub, node)
                else:
                    owner = "" if accept else ownership.controller
                    answer = await _register(stub, node, endpoint, owner)
                    ownership.claim(answer.controller_id)
                    told = answer.heartbeat_interval.ToNanoseconds() / 1e9
                    heartbeat_seconds = told or heartbeat_seconds
                    registered = True
                pause = heartbeat_seconds
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                if registered or error.reason != "UNAVAILABLE":
                    log.warning(
                        "controller not reached",
                        controller=controller,
                        reason=error.reason,
                        error=error.message,
                    )
                registered = False
                pause = RETRY_SECONDS
            await asyncio.sleep(pause)


async def _register(
    stub: pb2_grpc.NodeServiceAsyncStub, node: NodeServicer, endpoint: str, owner: str
) -> pb2.RegisterNodeResponse:
    described = node.describe()
    request = pb2.RegisterNodeRequest(
        node_id=node.node_id,
        controller_id=owner,
        node=pb2.Node(
            name=names.build("nodes", node.node_id),
            endpoint=endpoint,
            version=described.version,
            gpu_models=[gpu.model for gpu in described.gpus],
            memory_total_bytes=described.memory_total_bytes,
            memory_available_bytes=described.memory_available_bytes,
            cpu_count=described.cpu_count,
            checkpoint_capable=described.checkpoint_capable,
            object_store=described.object_store,
            findings=[
                pb2.NodeFinding(check=finding.check, passed=finding.passed, message=finding.message)
                for finding in described.findings
            ],
        ),
    )
    answer = await stub.RegisterNode(request, timeout=CALL_TIMEOUT)
    log.info("registered with the controller", node=node.node_id, endpoint=endpoint)
    return answer


async def _heartbeat(stub: pb2_grpc.NodeServiceAsyncStub, node: NodeServicer) -> None:
    available = node.describe().memory_available_bytes
    request = pb2.HeartbeatRequest(name=names.build("nodes", node.node_id), memory_available_bytes=available)
    await stub.Heartbeat(request, timeout=CALL_TIMEOUT)

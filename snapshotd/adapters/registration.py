"""Tell the controller that this node exists, and keep telling it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import grpc
import structlog

from dumont import names
from dumont.controller.v1 import node_service_pb2 as pb2
from dumont.controller.v1 import node_service_pb2_grpc as pb2_grpc
from dumont.rpc.status import from_rpc_error
from dumont.snapshotd.v1 import node_service_pb2 as snapshotd_pb2

log = structlog.get_logger(__name__)

CALL_TIMEOUT = 5.0
RETRY_SECONDS = 1.0


Describe = Callable[[], snapshotd_pb2.Node]


class Owner(Protocol):
    """The controller that this node belongs to."""

    controller: str

    def claim(self, controller: str) -> None:
        """Belong to the controller of that id from now on."""
        ...


async def keep_registered(
    controller: str,
    endpoint: str,
    node_id: str,
    describe: Describe,
    heartbeat_seconds: float,
    owner: Owner,
    accept: bool = False,
) -> None:
    """Register this node and send heartbeats until cancelled; register again after a lost connection.

    Args:
        controller: its address.
        endpoint: where it reaches this node.
        describe: what this node has, as it is now.
        heartbeat_seconds: used unless the controller's answer names another interval.
        owner: the controller that this node belongs to.
        accept: belong to whichever controller answers at that address.
    """
    async with grpc.aio.insecure_channel(controller) as channel:
        stub: pb2_grpc.NodeServiceAsyncStub = pb2_grpc.NodeServiceStub(channel)
        registered = False
        while True:
            try:
                if registered:
                    await _heartbeat(stub, node_id, describe)
                else:
                    answer = await _register(
                        stub, node_id, describe, endpoint, "" if accept else owner.controller
                    )
                    owner.claim(answer.controller_id)
                    wanted = answer.heartbeat_interval.ToNanoseconds() / 1e9
                    heartbeat_seconds = wanted or heartbeat_seconds
                    registered = True
                pause = heartbeat_seconds
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                if registered or error.reason != "UNAVAILABLE":
                    log.warning(
                        "controller_unreachable",
                        controller=controller,
                        reason=error.reason,
                        error=error.message,
                    )
                registered = False
                pause = RETRY_SECONDS
            except Exception:
                # A full disk, say, must not keep a node that serves from being heard of for good.
                log.exception("registration_failed", controller=controller)
                registered = False
                pause = RETRY_SECONDS
            await asyncio.sleep(pause)


async def _register(
    stub: pb2_grpc.NodeServiceAsyncStub, node_id: str, describe: Describe, endpoint: str, owner: str
) -> pb2.RegisterNodeResponse:
    described = describe()
    request = pb2.RegisterNodeRequest(
        node_id=node_id,
        controller_id=owner,
        node=pb2.Node(
            name=names.build("nodes", node_id),
            endpoint=endpoint,
            version=described.version,
            gpu_models=[gpu.model for gpu in described.gpus],
            memory_total_bytes=described.memory_total_bytes,
            memory_available_bytes=described.memory_available_bytes,
            cpu_count=described.cpu_count,
            checkpoint_capable=described.checkpoint_capable,
            object_store=described.object_store,
            snapshot_limit_bytes=described.snapshot_limit_bytes,
            gpus=_gpus(described),
            instance_memory_limit_bytes=described.instance_memory_limit_bytes,
            parked_memory_limit_bytes=described.parked_memory_limit_bytes,
            weight_cache_limit_bytes=described.weight_cache_limit_bytes,
            weight_cache_bytes=described.weight_cache_bytes,
            disk_free_bytes=described.disk_free_bytes,
            engines={engine.name: engine.version for engine in described.engines},
            findings=[
                pb2.NodeFinding(check=finding.check, passed=finding.passed, message=finding.message)
                for finding in described.findings
            ],
        ),
    )
    answer = await stub.RegisterNode(request, timeout=CALL_TIMEOUT)
    log.info("node_registered", node=node_id, endpoint=endpoint)
    return answer


async def _heartbeat(stub: pb2_grpc.NodeServiceAsyncStub, node_id: str, describe: Describe) -> None:
    described = describe()
    request = pb2.HeartbeatRequest(
        name=names.build("nodes", node_id),
        memory_available_bytes=described.memory_available_bytes,
        gpus=_gpus(described),
        disk_free_bytes=described.disk_free_bytes,
        weight_cache_bytes=described.weight_cache_bytes,
    )
    await stub.Heartbeat(request, timeout=CALL_TIMEOUT)


def _gpus(described: snapshotd_pb2.Node) -> list[pb2.NodeGpu]:
    return [
        pb2.NodeGpu(
            uuid=gpu.uuid,
            model=gpu.model,
            memory_total_bytes=gpu.memory_total_bytes,
            memory_free_bytes=gpu.memory_free_bytes,
            memory_other_bytes=gpu.memory_other_bytes,
        )
        for gpu in described.gpus
    ]

"""What share of a core a controller takes for the heartbeats of many nodes.

    scripts/bench-heartbeats [NODES ...]

The controller's real services run in a process of their own, over nodes in memory, and get over loopback what
nodes with eight GPUs send every five seconds. What is measured is the processor time of that process.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import grpc
import psutil
import structlog
import uvloop

from controller.adapters.clock import SystemClock
from controller.assembly import assemble
from controller.config import Config
from controller.identity import Established, Identity
from controller.main import DOMAIN, LIMITS, add_services
from dumont.controller.v1 import node_service_pb2 as pb
from dumont.controller.v1 import node_service_pb2_grpc as pb_grpc
from dumont.rpc.operations import Operations
from dumont.rpc.server import bind, new_server
from tests.fakes.memory_nodes import MemoryNodes
from tests.fakes.memory_registry import MemoryRegistry

INTERVAL = 5.0
GPUS = 8
MEASURED_SECONDS = 20.0
LIMIT = 0.20
# Each as a group of nodes has it: a connection.
CONNECTIONS = 50


async def serve(count: int) -> None:
    """The controller; prints its address, and ends with its input."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    clock, registry = SystemClock(), MemoryRegistry()
    nodes = MemoryNodes(clock)
    for number in range(count):
        nodes.add_node(f"n{number}")
    who = await registry.join(lambda *_: Established(Identity("bench", 1)), "", 10.0)
    controller = await assemble(nodes, registry, clock, who, INTERVAL)
    server = new_server(DOMAIN, LIMITS)
    add_services(server, controller, Operations(DOMAIN), Config(), asyncio.Event())
    print(bind(server, "127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


def gpus(free: int) -> list[pb.NodeGpu]:
    """As a node reports them."""
    return [
        pb.NodeGpu(uuid=f"GPU-{number}", model="H200", memory_total_bytes=1 << 37, memory_free_bytes=free)
        for number in range(GPUS)
    ]


def measure(count: int) -> dict[str, float]:
    """The share of a core, after every node has registered."""
    command = [sys.executable, "-m", __spec__.name, "--serve", str(count)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        return asyncio.run(_measure(count, child.pid, child.stdout.readline().strip()))
    finally:
        child.communicate()


async def _measure(count: int, pid: int, address: str) -> dict[str, float]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)]
    stubs = [pb_grpc.NodeServiceStub(channel) for channel in channels]
    try:
        for number in range(count):
            node = pb.Node(endpoint=f"n{number}:7071", gpus=gpus(1 << 36), checkpoint_capable=True)
            await stubs[number % CONNECTIONS].RegisterNode(
                pb.RegisterNodeRequest(node_id=f"n{number}", node=node)
            )
        sent = 0

        async def beat(number: int, until: float) -> None:
            nonlocal sent
            stub = stubs[number % CONNECTIONS]
            await asyncio.sleep(INTERVAL * number / count)
            while time.monotonic() < until:
                request = pb.HeartbeatRequest(
                    name=f"nodes/n{number}", memory_available_bytes=1 << 34, gpus=gpus((1 << 36) + sent)
                )
                await stub.Heartbeat(request)
                sent += 1
                await asyncio.sleep(INTERVAL)

        process = psutil.Process(pid)
        began, before = time.monotonic(), sum(process.cpu_times()[:2])
        await asyncio.gather(*(beat(number, began + MEASURED_SECONDS) for number in range(count)))
        elapsed, used = time.monotonic() - began, sum(process.cpu_times()[:2]) - before
    finally:
        for channel in channels:
            await channel.close()
    # Not all of them send all of the time that is measured.
    share = used / sent * count / INTERVAL
    return {
        "nodes": count,
        "heartbeats_per_second": round(sent / elapsed, 1),
        "share_of_a_core": round(share, 4),
        "microseconds_each": round(used / sent * 1e6, 1),
        "within_limit": count != 1000 or share <= LIMIT,
    }


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--serve"]:
        uvloop.run(serve(int(words[1])))
        return
    for count in [int(word) for word in words] or [1000]:
        print(json.dumps(measure(count)))


if __name__ == "__main__":
    main()

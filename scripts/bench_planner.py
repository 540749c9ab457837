"""How long the controller plans after one change, and what deleting many deployments costs it.

    scripts/bench-planner [DEPLOYMENTS ...]

Everything is in memory and nothing waits: what is measured is the processor time that the planner takes
from requests. Each deployment has a parked instance and a snapshot, on one of ten nodes.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import structlog

from controller.assembly import Controller, assemble
from controller.identity import Established, Identity
from controller.model import (
    Captured,
    Checkpoint,
    Deployment,
    InstanceState,
    Node,
    NodeState,
    Report,
    Snapshot,
    StartMode,
)
from tests.fakes.manual_clock import ManualClock
from tests.fakes.memory_nodes import MemoryNodes
from tests.fakes.memory_registry import MemoryRegistry

NODES = 10
CHANGES = 500
DELETED = 1000
LIMIT_MS = 1.0


async def controller_of(deployments: int) -> tuple[Controller, MemoryNodes]:
    """A controller that knows so many deployments, each asleep."""
    clock, registry = ManualClock(), MemoryRegistry()
    nodes, now = MemoryNodes(clock), clock.moment().wall
    for number in range(NODES):
        nodes.add_node(f"n{number}")
        await registry.save_node(Node(f"n{number}", f"n{number}:7071", checkpoint_capable=True))
    for number in range(deployments):
        name, node = f"d{number}", f"n{number % NODES}"
        made = Deployment(
            name, name, "m", "causal_lm", StartMode.CHECKPOINT, Checkpoint(True), None, None, now, now, "e"
        )
        await registry.create_deployment(made)
        await registry.save_captured(Captured(f"s-{name}", name, name, "digest", node))
        world = nodes.world[node]
        world.instances[f"i-{name}"] = Report(f"i-{name}", name, InstanceState.PARKED, create_time=now)
        world.snapshots[f"s-{name}"] = Snapshot(f"s-{name}", name, node, now, manifest_digest="digest")
    who = await registry.join(lambda *_: Established(Identity("bench", 1)), "", 10.0)
    controller = await assemble(nodes, registry, clock, who)
    known = controller.core.inventory.nodes
    await controller.core.inventory.until(
        lambda: len(known) == NODES and all(node.state is NodeState.READY for node in known.values())
    )
    # All of them have just been learned: what that needs is planned first.
    while controller.reconciler.step() == 0.0:
        pass
    return controller, nodes


def one_change(controller: Controller, number: int) -> float:
    """Milliseconds that the planner takes after an instance has changed."""
    inventory = controller.core.inventory
    instance = inventory.instances[f"i-d{number}"]
    inventory.report(instance.node, replace(instance.report, memory_bytes=number))
    began = time.thread_time()
    controller.reconciler.step()
    return (time.thread_time() - began) * 1e3


async def deletion(controller: Controller, count: int) -> float:
    """Processor seconds that deleting so many deployments at once takes."""
    core = controller.core
    began = time.process_time()

    async def delete(name: str) -> None:
        await core.deployments.begin_delete(name)
        await core.inventory.until(lambda: name not in core.deployments.by_id, f"deployments/{name}")

    await asyncio.gather(*(delete(f"d{number}") for number in range(count)))
    return time.process_time() - began


async def measure(deployments: int) -> dict[str, Any]:
    controller, _ = await controller_of(deployments)
    times = sorted(one_change(controller, number % deployments) for number in range(CHANGES))
    deleted = min(DELETED, deployments)
    seconds = await deletion(controller, deleted)
    await controller.close()
    return {
        "deployments": deployments,
        "one_change_ms_p50": round(statistics.median(times), 4),
        "one_change_ms_p99": round(times[int(len(times) * 0.99)], 4),
        "one_change_limit_ms": LIMIT_MS,
        "deleted": deleted,
        "deletion_cpu_s": round(seconds, 3),
    }


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    for deployments in [int(word) for word in sys.argv[1:]] or [500, 2000, 20_000]:
        print(json.dumps(asyncio.run(measure(deployments))))


if __name__ == "__main__":
    main()

"""How long the controller decides where a deployment starts.

    scripts/bench-placement [NODES ...]

What is measured is the processor time of one decision, which is what other requests wait for. Each node has a
GPU and an idle instance of another deployment on it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from typing import Final

from controller import policy
from controller.estimates import Estimates, Work
from controller.model import (
    Checkpoint,
    Deployment,
    Gpu,
    Instance,
    InstanceState,
    Node,
    NodeState,
    Report,
    Snapshot,
    StartMode,
)
from controller.room import Tenant

GIB: Final = 1 << 30
DECISIONS: Final = 300
LIMIT_MS: Final = 1.0
NOW: Final = 10_000.0


def nodes_with(free: int, count: int) -> dict[str, Node]:
    """So many nodes with a GPU of which so many bytes are free."""
    names = [f"n{number:04}" for number in range(count)]
    return {
        name: Node(
            name,
            f"{name}:7071",
            NodeState.READY,
            checkpoint_capable=True,
            object_store="s3://b",
            gpus=(Gpu(f"GPU-{name}", "H", 80 * GIB, free_bytes=free + number),),
            instance_memory_limit_bytes=500 * GIB,
            parked_memory_limit_bytes=250 * GIB,
        )
        for number, name in enumerate(names)
    }


def scenes(count: int) -> dict[str, policy.Facts]:
    """What is known in each situation, on so many nodes."""
    roomy, crowded = nodes_with(20 * GIB, count), nodes_with(10 * GIB, count)
    names = list(roomy)
    deployment = Deployment(
        "qa", "u", "m", "causal_lm", StartMode.CHECKPOINT, Checkpoint(True), None, None, 0.0, 0.0, "e"
    )
    estimates = Estimates()
    serving = Report("qa-0", "qa", InstanceState.SERVING, gpu="GPU-0", gpu_bytes=16 * GIB, ram_bytes=4 * GIB)
    estimates.learn(names[0], serving, None)
    for name in names[:50]:
        estimates.took("qa", name, Work.RESTORE, 0.5)

    def tenants(size: int, in_flight: int = 0) -> policy.Tenants:
        def on(name: str) -> list[Tenant]:
            report = Report(
                f"o-{name}", "other", InstanceState.SERVING, gpu=f"GPU-{name}", gpu_bytes=size * GIB
            )
            one = Instance(name, InstanceState.SERVING, report, 0.0, 0.0, in_flight=in_flight)
            return [Tenant(one, park_seconds=0.5)]

        return on

    held = Snapshot("s", "qa", names[-1], 1.0, owner="u", size_bytes=GIB, device="cuda:0", gpu_bytes=16 * GIB)
    published = tuple(replace(held, node=name, local=False, published=True) for name in names)
    known = policy.Facts(deployment, (), (), roomy, tenants=tenants(60), estimates=estimates)
    full = replace(known, nodes=crowded, tenants=tenants(70, in_flight=1))
    return {
        "cold, everywhere room": known,
        "cold, an idle one yields": replace(full, tenants=tenants(70)),
        "cold, all in use": full,
        "a snapshot on one node": replace(known, snapshots=(held,)),
        "a snapshot in the object store": replace(known, snapshots=published),
        "the same, all in use": replace(full, snapshots=published),
    }


def milliseconds(facts: policy.Facts) -> list[float]:
    """Of each of many decisions, in order of length."""
    times = []
    for _ in range(DECISIONS):
        began = time.thread_time()
        policy.decide(facts, NOW)
        times.append((time.thread_time() - began) * 1e3)
    return sorted(times)


def main() -> None:
    for nodes in [int(word) for word in sys.argv[1:]] or [100, 1000]:
        for name, facts in scenes(nodes).items():
            times = milliseconds(facts)
            print(
                json.dumps(
                    {
                        "nodes": nodes,
                        "situation": name,
                        "decision_ms_p50": round(statistics.median(times), 3),
                        "decision_ms_p99": round(times[int(len(times) * 0.99)], 3),
                        "limit_ms": LIMIT_MS,
                    }
                )
            )


if __name__ == "__main__":
    main()

"""What a node says of itself: its GPUs and what holds their memory, its budgets, and its instances' sizes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from snapshotd.adapters import registration
from snapshotd.assembly import PARKED_MEMORY_SHARE, budgets
from snapshotd.config import Settings
from snapshotd.model import Budgets
from snapshotd.service import convert
from snapshotd.service.node import NodeServicer
from snapshotd.system import linux
from snapshotd.weights.files import NodeWeightFiles
from tests.unit.snapshotd.instances.gpu_world import GIB, A, B, World, a_world


def servicer(world: World, tmp_path: Path) -> NodeServicer:
    limits = Budgets(500, 250, 100, 50, tmp_path)
    node = world.instances.node
    world.instances.node = replace(node, facts={**node.facts, "dumont": "1"})
    return NodeServicer(world.instances, "n1", (), limits, "s3://bucket", lambda: 7)


async def test_a_node_reports_what_of_its_gpus_is_free_and_what_is_not_its_instances(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    await world.serving(A.uuid)
    # Something else holds 10 GiB there, and a job has reserved two on the other one.
    world.status.free_bytes[A.uuid] = A.memory_total - 16 * GIB
    world.gpus.reservations.reserve("two", B.uuid, 2 * GIB)

    one, other = servicer(world, tmp_path).describe().gpus

    assert (one.uuid, one.memory_free_bytes, one.memory_other_bytes) == (
        A.uuid,
        A.memory_total - 16 * GIB,
        10 * GIB,
    )
    assert other.memory_free_bytes == world.status.free_bytes[B.uuid] - 2 * GIB
    assert other.memory_other_bytes == B.memory_total - world.status.free_bytes[B.uuid]


async def test_a_node_reports_its_budgets_and_what_its_caches_take(tmp_path: Path) -> None:
    node = servicer(a_world(tmp_path), tmp_path).describe()
    assert (node.instance_memory_limit_bytes, node.parked_memory_limit_bytes) == (500, 250)
    assert (node.snapshot_limit_bytes, node.weight_cache_limit_bytes, node.weight_cache_bytes) == (100, 50, 7)
    assert node.disk_free_bytes > 0


async def test_what_the_controller_is_told_with_each_heartbeat_is_what_the_node_says(tmp_path: Path) -> None:
    described = servicer(a_world(tmp_path), tmp_path).describe()
    told = registration._gpus(described)
    assert [(gpu.uuid, gpu.memory_free_bytes, gpu.memory_other_bytes) for gpu in told] == [
        (gpu.uuid, gpu.memory_free_bytes, gpu.memory_other_bytes) for gpu in described.gpus
    ]


async def test_a_serving_instance_is_reported_with_the_gpu_memory_that_it_holds(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    await world.serving(A.uuid)
    await world.instances.measure("one")
    reported = convert.instance(world.instances.get("one"))
    assert (reported.gpu, reported.gpu_bytes) == (A.uuid, 6 * GIB)


def test_the_memory_of_a_process_counts_without_what_it_shares() -> None:
    assert linux.own_memory(os.getpid()) > 1 << 20
    assert linux.own_memory(0) == linux.own_memory(2**22 + 1) == 0


def test_the_budgets_are_what_was_configured_or_a_share_of_the_memory(tmp_path: Path) -> None:
    weights = NodeWeightFiles(tmp_path / "weights.json", None)
    set_so = Settings(state_dir=tmp_path, instance_memory_bytes=1000, parked_memory_bytes=0, cache_bytes=5)
    assert budgets(set_so, weights) == Budgets(1000, 0, 5, 0, tmp_path)
    usual = budgets(Settings(state_dir=tmp_path), weights)
    assert usual.parked > 0
    assert usual.parked == int(usual.instances * PARKED_MEMORY_SHARE)

"""What an instance takes and is at: learnt from its model host, told to whoever follows, never in the way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from snapshotd.instances.load import follow_load
from snapshotd.jobs.actions import with_load
from snapshotd.model import Capacity, Json, Load, State
from snapshotd.service import convert
from tests.unit.snapshotd.instances.instances_world import (
    FakeHosts,
    FakeWeights,
    World,
    a_node,
    an_instance,
    instances_of,
)

TOLD: Json = {
    "capacity": {"sequences": 128, "kv_tokens": 4096},
    "running": 3,
    "waiting": 1,
    "kv_tokens_used": 512,
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    hosts, weights = FakeHosts(), FakeWeights()
    return World(instances_of(a_node(tmp_path, hosts, weights=weights)), hosts, weights, tmp_path)


def test_what_a_host_tells_is_taken_in_and_told_on() -> None:
    measured = with_load(an_instance(State.SERVING), TOLD)

    assert (measured.capacity, measured.load) == (Capacity(128, 4096), Load(3, 1, 512))
    message = convert.instance(measured)
    assert (message.capacity.sequences, message.capacity.kv_tokens) == (128, 4096)
    assert (message.load.running, message.load.waiting, message.load.kv_tokens_used) == (3, 1, 512)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"capacity": None, "running": None},
        {"capacity": 128, "running": "3"},
        {"capacity": {"sequences": -1}, "waiting": -2},
        {"capacity": {}, "kv_tokens_used": True},
    ],
)
def test_what_an_older_host_leaves_out_or_says_otherwise_is_unknown(answer: Json) -> None:
    measured = with_load(an_instance(State.SERVING), answer)

    assert (measured.capacity, measured.load) == (None, Load())
    assert not convert.instance(measured).HasField("capacity")


def test_an_engine_without_a_kv_cache_says_so() -> None:
    told = {"sequences": 32, "kv_tokens": None, "unbatched_reason": "it looks ahead"}
    measured = with_load(an_instance(State.SERVING), {"capacity": told})

    assert measured.capacity == Capacity(32, None, "it looks ahead")
    assert convert.instance(measured).capacity.unbatched_reason == "it looks ahead"
    assert not convert.instance(measured).capacity.HasField("kv_tokens")


async def test_the_capacity_is_known_when_an_instance_has_loaded(world: World) -> None:
    world.hosts.host.load = TOLD
    await world.started()

    assert world.instances.get("one").capacity == Capacity(128, 4096)


async def test_a_change_is_told_once(world: World) -> None:
    host = await world.started()
    async with world.instances.changes() as changes:
        changes.get_nowait()
        host.load = TOLD
        await world.instances.measure("one")
        await world.instances.measure("one")

        change = changes.get_nowait()
        assert change.instance is not None
        assert change.instance.load == Load(3, 1, 512)
        assert changes.empty()


async def test_an_instance_that_parks_or_is_gone_or_silent_is_left_alone(world: World) -> None:
    host = await world.started()
    host.failing.add("status")
    await world.instances.measure("one")
    assert world.instances.get("one").state is State.SERVING

    host.failing.clear()
    await world.instances.park("one")
    asked = host.status_calls
    await world.instances.measure("one")
    await world.instances.measure("gone")
    assert host.status_calls == asked


async def test_one_that_begins_to_serve_is_asked_at_once(world: World) -> None:
    following = asyncio.create_task(follow_load(world.instances, interval=3600))
    world.hosts.host.load = TOLD
    await world.started()
    async with world.instances.changes() as changes, asyncio.timeout(5):
        while (change := await changes.get()).instance is None or change.instance.load == Load():
            pass
    following.cancel()

    assert world.instances.get("one").load == Load(3, 1, 512)

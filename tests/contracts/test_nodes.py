"""What the controller's Nodes promise: nodes in memory, and a real snapshotd over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.adapters.clock import SystemClock
from controller.adapters.nodes_grpc import GrpcNodes
from controller.model import InstanceState, Report, Weights
from controller.ports import NODE_UNAVAILABLE, Nodes, Removed, Synchronized
from dumont.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from dumont.names import new_id
from dumont.snapshotd.v1 import inference_service_pb2
from tests.fakes.memory_nodes import MemoryNodes
from tests.node.daemon import Daemon
from tests.node.store_nodes import StoreNodes

NODE = "n1"
DEPLOYMENT = "qa"


@dataclass
class World:
    """Some nodes of which one is there, with an object store, and has a model."""

    nodes: Nodes
    model: str

    async def started(self) -> str:
        """The id of a new instance that serves."""
        instance = new_id("i")
        await self.nodes.start(NODE, instance, DEPLOYMENT, self.model, "", Weights.DETACHED, {})
        return instance

    async def captured(self) -> tuple[str, str]:
        """The ids of an instance that serves and of its new snapshot."""
        instance, snapshot = await self.started(), new_id("s")
        await self.nodes.capture(NODE, instance, snapshot)
        return instance, snapshot

    async def listed(self) -> dict[str, tuple[bool, bool]]:
        """Of each snapshot by its id, whether it is on the node, and whether it is published."""
        found = await self.nodes.list_snapshots(NODE)
        return {snapshot.id: (snapshot.local, snapshot.published) for snapshot in found.snapshots}


@pytest.fixture(scope="module")
def daemon(
    criu: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("contract")
    with StoreNodes(root, free_port, f"file://{root}/bucket").node("n") as running:
        yield running


@pytest.fixture(params=["memory", pytest.param("snapshotd", marks=pytest.mark.node)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "memory":
        memory = MemoryNodes(SystemClock())
        memory.add_node(NODE).store = True
        memory.weights_bytes["org/model"], memory.sizes[DEPLOYMENT] = 1 << 20, (0, 1 << 20)
        made = World(memory, "org/model")
        await memory.connect(NODE, "in memory")
    else:
        daemon: Daemon = request.getfixturevalue("daemon")
        made = World(GrpcNodes("a-test"), str(request.getfixturevalue("small_model")))
        await made.nodes.connect(NODE, daemon.address)
    yield made
    await made.nodes.connect(NODE, daemon.address if request.param == "snapshotd" else "in memory")
    async with aclosing(made.nodes.watch(NODE)) as changes:
        left = []
        while isinstance(change := await anext(changes), Report):
            left.append(change.id)
    for instance in left:
        await made.nodes.stop(NODE, instance)
    await made.nodes.close()


async def refused(world: World, method: str, *arguments: object) -> DumontError:
    """The error that a call of the node ends with."""
    with pytest.raises(DumontError) as refusal:
        await getattr(world.nodes, method)(NODE, *arguments)
    return refusal.value


async def test_nothing_is_known_of_a_node_that_does_not_answer(world: World) -> None:
    with pytest.raises(Unavailable) as silence:
        await world.nodes.get_instance("nowhere", "i")
    assert silence.value.reason == NODE_UNAVAILABLE


async def test_a_disconnected_node_does_not_answer_until_it_is_connected_again(world: World) -> None:
    await world.nodes.disconnect(NODE)
    assert (await refused(world, "get_instance", "i")).reason == NODE_UNAVAILABLE


@pytest.mark.parametrize("method", ["get_instance", "park", "resume", "stop"])
async def test_an_instance_that_is_not_there_is_not_found(world: World, method: str) -> None:
    error = await refused(world, method, "none")
    assert (type(error), error.reason) == (NotFound, "INSTANCE_NOT_FOUND")


async def test_an_instance_that_is_not_there_is_not_captured(world: World) -> None:
    error = await refused(world, "capture", "none", "s")
    assert (type(error), error.reason) == (NotFound, "INSTANCE_NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("get_snapshot", ("none",)),
        ("delete_snapshot", ("none",)),
        ("publish", ("none",)),
        ("verify", ("none",)),
        ("prefetch", ("none", "")),
        ("restore", ("i", DEPLOYMENT, "none", "")),
    ],
)
async def test_a_snapshot_that_is_not_there_is_not_found(
    world: World, method: str, arguments: tuple[str, ...]
) -> None:
    error = await refused(world, method, *arguments)
    assert (type(error), error.reason) == (NotFound, "SNAPSHOT_NOT_FOUND")


async def test_a_model_is_found_with_its_engine(world: World) -> None:
    assert (await world.nodes.resolve_model(NODE, world.model, "")).engine == "causal_lm"
    assert (await world.nodes.resolve_model(NODE, world.model, "causal_lm")).engine == "causal_lm"


async def test_a_model_is_found_with_the_size_of_its_weights(world: World) -> None:
    assert (await world.nodes.resolve_model(NODE, world.model, "")).weights_bytes > 0


async def test_an_instance_is_reported_with_the_memory_that_its_end_makes_free(world: World) -> None:
    known = await world.nodes.get_instance(NODE, await world.started())
    assert known.ram_bytes > 0
    assert (known.device, known.gpu, known.gpu_bytes) == ("cpu", "", 0)


async def test_a_gpu_that_the_node_does_not_have_is_refused(world: World) -> None:
    error = await refused(
        world, "start", "one", DEPLOYMENT, world.model, "", Weights.DETACHED, {}, "GPU-none"
    )
    assert (type(error), error.reason) == (InvalidArgument, "GPU_UNKNOWN")


async def test_an_answer_that_was_cancelled_is_read_no_further(world: World) -> None:
    instance = await world.started()
    request = inference_service_pb2.GenerateRequest(
        name=f"instances/{instance}", prompt="a", max_new_tokens=50, ignore_eos=True
    )
    answer = world.nodes.generate(NODE, request.SerializeToString(), 60.0)
    assert await answer.read() is not None
    answer.cancel()
    with pytest.raises(Cancelled) as ended:
        await answer.read()
    assert ended.value.reason == "CALL_CANCELLED"


async def test_a_started_instance_serves(world: World) -> None:
    made = await world.nodes.start(NODE, "one", DEPLOYMENT, world.model, "", Weights.INCLUDED, {})

    assert (made.id, made.deployment, made.state) == ("one", DEPLOYMENT, InstanceState.SERVING)
    assert (made.model, made.weights, made.snapshot) == (world.model, Weights.INCLUDED, "")
    assert made.phases
    assert (await world.nodes.get_instance(NODE, "one")).state is InstanceState.SERVING


async def test_a_start_that_is_repeated_joins_the_first(world: World) -> None:
    def start() -> Awaitable[Report]:
        return world.nodes.start(NODE, "one", DEPLOYMENT, world.model, "", Weights.DETACHED, {})

    one, other = await asyncio.gather(start(), start())
    assert (one.id, one.state, one.pid) == (other.id, other.state, other.pid)


async def test_a_cancelled_start_is_cancelled_on_the_node(world: World) -> None:
    async with aclosing(world.nodes.watch(NODE)) as changes:
        while not isinstance(await anext(changes), Synchronized):
            pass
        start = world.nodes.start(NODE, "one", DEPLOYMENT, world.model, "", Weights.DETACHED, {})
        starting = asyncio.create_task(start)
        await anext(changes)

        starting.cancel()

        with pytest.raises(asyncio.CancelledError):
            await starting
        async for change in changes:
            if isinstance(change, Report) and change.state is not InstanceState.STARTING:
                break
    assert isinstance(change, Report)
    assert change.state is InstanceState.FAILED


async def test_a_watch_reports_what_is_there_then_each_change(world: World) -> None:
    before = await world.started()

    async with aclosing(world.nodes.watch(NODE)) as changes:
        known = await anext(changes)
        assert isinstance(known, Report)
        assert (known.id, known.state) == (before, InstanceState.SERVING)
        assert isinstance(await anext(changes), Synchronized)

        await world.nodes.park(NODE, before)
        async for change in changes:
            assert isinstance(change, Report)
            if change.state is InstanceState.PARKED:
                break
        await world.nodes.stop(NODE, before)
        async for change in changes:
            if isinstance(change, Removed):
                break
        assert change == Removed(before)


async def test_a_parked_instance_resumes_and_neither_happens_twice(world: World) -> None:
    instance = await world.started()

    assert (await world.nodes.park(NODE, instance)).state is InstanceState.PARKED
    error = await refused(world, "park", instance)
    assert (type(error), error.reason) == (FailedPrecondition, "ILLEGAL_TRANSITION")
    assert (await world.nodes.resume(NODE, instance)).state is InstanceState.SERVING
    assert (await refused(world, "resume", instance)).reason == "ILLEGAL_TRANSITION"


async def test_what_runs_on_the_cpu_moves_to_no_gpu_and_serves_on(world: World) -> None:
    instance = await world.started()
    error = await refused(world, "move", instance, "0")
    assert (type(error), error.reason) == (FailedPrecondition, "NO_GPU")
    assert (await world.nodes.get_instance(NODE, instance)).state is InstanceState.SERVING
    assert (await refused(world, "move", "none", "0")).reason == "INSTANCE_NOT_FOUND"


async def test_a_stopped_instance_is_gone(world: World) -> None:
    instance = await world.started()
    await world.nodes.stop(NODE, instance)
    assert isinstance(await refused(world, "get_instance", instance), NotFound)


async def test_a_captured_instance_serves_on_and_its_snapshot_is_listed(world: World) -> None:
    instance = await world.started()

    made = await world.nodes.capture(NODE, instance, "captured")

    assert (made.id, made.deployment, made.node) == ("captured", DEPLOYMENT, NODE)
    assert (made.weights, made.local, made.published) == (Weights.DETACHED, True, False)
    assert made.manifest_digest
    assert (await world.nodes.get_snapshot(NODE, "captured")).manifest_digest == made.manifest_digest
    assert (await world.listed())["captured"] == (True, False)
    assert (await world.nodes.get_instance(NODE, instance)).state is InstanceState.SERVING
    error = await refused(world, "capture", instance, "captured")
    assert (type(error), error.reason) == (AlreadyExists, "SNAPSHOT_EXISTS")
    await world.nodes.delete_snapshot(NODE, "captured")


async def test_an_instance_that_was_asked_something_is_never_captured(world: World) -> None:
    instance = await world.started()
    request = inference_service_pb2.GenerateRequest(
        name=f"instances/{instance}", prompt="a secret", max_new_tokens=2
    )
    answer = world.nodes.generate(NODE, request.SerializeToString(), 60.0)
    frames = 0
    while await answer.read() is not None:
        frames += 1
    answer.cancel()
    assert frames > 1

    error = await refused(world, "capture", instance, "secret")

    assert (type(error), error.reason) == (FailedPrecondition, "INSTANCE_SERVED")
    assert "secret" not in await world.listed()


async def test_a_snapshot_is_restored_if_it_is_the_one_that_was_asked_for(world: World) -> None:
    _, snapshot = await world.captured()
    digest = (await world.nodes.get_snapshot(NODE, snapshot)).manifest_digest

    error = await refused(world, "restore", "other", DEPLOYMENT, snapshot, "0" * 64)
    assert (type(error), error.reason) == (DataLoss, "MANIFEST_REPLACED")

    back = await world.nodes.restore(NODE, "back", "another", snapshot, digest)
    assert (back.state, back.snapshot, back.deployment) == (InstanceState.SERVING, snapshot, "another")
    await world.nodes.delete_snapshot(NODE, snapshot)


async def test_a_published_snapshot_can_be_deleted_and_brought_back(world: World) -> None:
    _, snapshot = await world.captured()
    assert (await world.nodes.publish(NODE, snapshot)).published
    assert (await world.nodes.publish(NODE, snapshot)).published
    assert (await world.listed())[snapshot] == (True, True)
    digest = (await world.nodes.get_snapshot(NODE, snapshot)).manifest_digest

    await world.nodes.delete_snapshot(NODE, snapshot)
    assert snapshot not in await world.listed()

    back = await world.nodes.undelete_snapshot(NODE, snapshot)
    assert (back.published, back.manifest_digest) == (True, digest)
    assert (await refused(world, "prefetch", snapshot, "0" * 64)).reason == "MANIFEST_REPLACED"
    assert (await world.nodes.prefetch(NODE, snapshot, digest)).local
    verified = await world.nodes.verify(NODE, snapshot)
    assert verified.local_bytes >= 0 <= verified.published_bytes
    await world.nodes.delete_snapshot(NODE, snapshot)
    await world.nodes.prune(NODE, dry_run=True)
    assert snapshot not in await world.listed()


async def test_the_log_of_an_instance_is_bytes(world: World) -> None:
    instance = await world.started()
    async with aclosing(world.nodes.stream_logs(NODE, instance, 10, False)) as log:
        assert all([isinstance(part, bytes) async for part in log])

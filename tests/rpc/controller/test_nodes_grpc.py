"""The ``Nodes`` port over snapshotd's API: operations awaited or cancelled, errors told apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from controller.adapters.nodes_grpc import GrpcNodes
from controller.model import InstanceState, Phase, Report, Weights
from controller.ports import Removed, Synchronized
from dumont.errors import Aborted, DataLoss, DeadlineExceeded, NotFound, Unavailable
from dumont.rpc.operations import Operations
from dumont.rpc.server import ServerLimits, bind, new_server
from dumont.sessions import SESSION_KEY, SESSIONS_KEY, Sessions
from dumont.snapshotd.v1 import (
    instance_service_pb2 as pb,
)
from dumont.snapshotd.v1 import (
    instance_service_pb2_grpc,
    node_service_pb2_grpc,
    snapshot_service_pb2_grpc,
)
from dumont.snapshotd.v1 import (
    node_service_pb2 as nodes_pb,
)
from dumont.snapshotd.v1 import (
    snapshot_service_pb2 as snapshots_pb,
)
from snapshotd.service.ownership import Ownership, OwnershipInterceptor

# Calls at once that a connection takes; far more of them are answers than commands.
STREAMS = 8
SERVING = pb.Instance(
    name="instances/qa-1",
    deployment="deployments/qa",
    state=pb.Instance.STATE_SERVING,
    pid=42,
    create_time=Timestamp(seconds=5),
    phases=[pb.Phase(name="load")],
)
SNAPSHOT = snapshots_pb.Snapshot(
    name="snapshots/s1", deployment="deployments/qa", state=snapshots_pb.Snapshot.STATE_ACTIVE
)
REPORT = Report("qa-1", "qa", InstanceState.SERVING, pid=42, create_time=5.0, phases=(Phase("load", 0.0),))


class Snapshotd(
    instance_service_pb2_grpc.InstanceServiceServicer,
    snapshot_service_pb2_grpc.SnapshotServiceServicer,
    node_service_pb2_grpc.NodeServiceServicer,
):
    """Answers as scripted: ``outcome`` is what its operations come to."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.operations = Operations("snapshotd.dumont")
        self.outcome: Callable[[], Awaitable[Message]]
        self.ended = asyncio.Event()

    def _begin(self, request: Message) -> operations_pb2.Operation:
        self.requests.append(request)

        async def work(_: object) -> Message:
            try:
                return await self.outcome()
            finally:
                self.ended.set()

        return self.operations.start("job", work, pb.OperationMetadata())

    async def StartInstance(self, request: Any, context: Any) -> operations_pb2.Operation:
        return self._begin(request)

    async def RestoreInstance(self, request: Any, context: Any) -> operations_pb2.Operation:
        return self._begin(request)

    async def CaptureInstance(self, request: Any, context: Any) -> operations_pb2.Operation:
        return self._begin(request)

    async def PrefetchSnapshot(self, request: Any, context: Any) -> operations_pb2.Operation:
        return self._begin(request)

    async def ParkInstance(self, request: Any, context: Any) -> pb.Instance:
        self.requests.append(request)
        return SERVING

    async def StopInstance(self, request: Any, context: Any) -> Empty:
        raise NotFound("INSTANCE_NOT_FOUND", "there is no such instance")

    async def GetInstance(self, request: Any, context: Any) -> pb.Instance:
        # A model host's transport error, passed on by a snapshotd that is well.
        raise Unavailable("UNAVAILABLE", "connection refused")

    async def WatchInstances(self, request: Any, context: Any) -> AsyncIterator[pb.WatchInstancesResponse]:
        yield pb.WatchInstancesResponse(instance=SERVING)
        yield pb.WatchInstancesResponse(synchronized=Empty())
        yield pb.WatchInstancesResponse(removed="instances/qa-1")

    async def ListSnapshots(self, request: Any, context: Any) -> snapshots_pb.ListSnapshotsResponse:
        bad = snapshots_pb.Snapshot(name="snapshots/s2", state=snapshots_pb.Snapshot.STATE_QUARANTINED)
        if request.page_token:
            return snapshots_pb.ListSnapshotsResponse(snapshots=[bad])
        return snapshots_pb.ListSnapshotsResponse(snapshots=[SNAPSHOT], next_page_token="more")

    async def ResolveModel(self, request: Any, context: Any) -> nodes_pb.Model:
        return nodes_pb.Model(model=request.model, engine="embedding")


class Inference:
    """Raw bytes in and out."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.time_left: list[float | None] = []
        self.hang = asyncio.Event()
        self.ended = asyncio.Event()

    def register(self, server: grpc.aio.Server) -> None:
        handlers: dict[str, Any] = {"Generate": grpc.unary_stream_rpc_method_handler(self.generate)}
        name = "dumont.snapshotd.v1.InferenceService"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    async def generate(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.received.append(request)
        self.time_left.append(context.time_remaining())
        try:
            yield b"\x12\x03\n\x01a"
            await self.hang.wait()
            yield b"\x1a\x00"
        finally:
            self.ended.set()


Connected = tuple[GrpcNodes, Snapshotd, Inference]


@pytest.fixture
async def node() -> AsyncIterator[Connected]:
    snapshotd, inference, nodes = Snapshotd(), Inference(), GrpcNodes("controller")
    server = new_server("snapshotd.dumont", ServerLimits(max_concurrent_streams=STREAMS))
    instance_service_pb2_grpc.add_InstanceServiceServicer_to_server(snapshotd, server)
    snapshot_service_pb2_grpc.add_SnapshotServiceServicer_to_server(snapshotd, server)
    node_service_pb2_grpc.add_NodeServiceServicer_to_server(snapshotd, server)
    snapshotd.operations.register(server)
    inference.register(server)
    await nodes.connect("n1", bind(server, "127.0.0.1:0"))
    await server.start()
    yield nodes, snapshotd, inference
    await nodes.close()
    await server.stop(0)
    await snapshotd.operations.close()


async def test_answers_under_way_do_not_keep_commands_from_a_node(node: Connected) -> None:
    nodes, _, _ = node
    streams = [nodes.generate("n1", b"\x0a\x01x", None) for _ in range(STREAMS)]
    for stream in streams:
        await stream.read()

    report = await asyncio.wait_for(nodes.park("n1", "qa-1"), 5)

    assert report == REPORT
    for stream in streams:
        stream.cancel()


async def serving() -> Message:
    return SERVING


async def test_a_start_is_awaited_to_its_report(node: Connected) -> None:
    nodes, snapshotd, _ = node
    snapshotd.outcome = serving
    assert await nodes.start("n1", "qa-1", "qa", "org/model", "causal_lm", Weights.INCLUDED, {}) == REPORT
    (sent,) = snapshotd.requests
    assert (sent.instance_id, sent.deployment, sent.model, sent.engine) == (
        "qa-1",
        "deployments/qa",
        "org/model",
        "causal_lm",
    )
    assert sent.weights == pb.WEIGHTS_INCLUDED


async def test_a_capture_is_awaited_to_its_snapshot(node: Connected) -> None:
    nodes, snapshotd, _ = node

    async def captured() -> Message:
        return SNAPSHOT

    snapshotd.outcome = captured
    made = await nodes.capture("n1", "qa-1", "s1")
    assert (made.id, made.deployment, made.node, made.quarantined) == ("s1", "qa", "n1", False)


async def test_a_prefetch_is_awaited_and_names_the_digest(node: Connected) -> None:
    nodes, snapshotd, _ = node

    async def fetched() -> Message:
        return SNAPSHOT

    snapshotd.outcome = fetched
    assert (await nodes.prefetch("n1", "s1", "cd34")).id == "s1"
    asked = snapshotd.requests[-1]
    assert (asked.name, asked.manifest_digest) == ("snapshots/s1", "cd34")


async def test_an_operations_error_arrives_as_itself(node: Connected) -> None:
    nodes, snapshotd, _ = node

    async def damaged() -> Message:
        raise DataLoss("CANARY_MISMATCH", "other tokens")

    snapshotd.outcome = damaged
    with pytest.raises(DataLoss) as failure:
        await nodes.restore("n1", "qa-1", "qa", "s1", "")
    assert failure.value.reason == "CANARY_MISMATCH"
    assert snapshotd.requests[0].snapshot == "snapshots/s1"


async def test_a_cancelled_start_is_cancelled_on_the_node(node: Connected) -> None:
    nodes, snapshotd, _ = node
    begun = asyncio.Event()

    async def forever() -> Message:
        begun.set()
        await asyncio.Event().wait()
        return SERVING

    snapshotd.outcome = forever
    starting = asyncio.create_task(nodes.start("n1", "qa-1", "qa", "m", "", Weights.DETACHED, {}))
    await begun.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    async with asyncio.timeout(5):
        await snapshotd.ended.wait()
    assert snapshotd.ended.is_set()


async def test_a_watch_tells_everything_then_changes_then_that_it_ended(node: Connected) -> None:
    nodes, _, _ = node
    seen = []
    changes = nodes.watch("n1")
    async with aclosing(changes):
        for _ in range(3):
            seen.append(await anext(changes))  # noqa: PERF401
        with pytest.raises(Unavailable) as failure:
            await anext(changes)
    assert seen == [REPORT, Synchronized(), Removed("qa-1")]
    assert failure.value.reason == "NODE_UNAVAILABLE"


async def test_snapshots_of_all_pages_are_listed(node: Connected) -> None:
    nodes, _, _ = node
    found = (await nodes.list_snapshots("n1")).snapshots
    assert [(snapshot.id, snapshot.quarantined) for snapshot in found] == [
        ("s1", False),
        ("s2", True),
    ]


async def test_short_calls_return_what_the_node_says(node: Connected) -> None:
    nodes, _, _ = node
    assert await nodes.park("n1", "qa-1") == REPORT
    assert (await nodes.resolve_model("n1", "org/model", "")).engine == "embedding"
    with pytest.raises(NotFound) as failure:
        await nodes.stop("n1", "qa-1")
    assert failure.value.reason == "INSTANCE_NOT_FOUND"


async def test_a_node_that_is_well_is_told_from_one_that_is_silent(node: Connected) -> None:
    nodes, _, _ = node
    with pytest.raises(Unavailable) as passed_on:
        await nodes.get_instance("n1", "qa-1")
    assert passed_on.value.reason == "UNAVAILABLE"
    await nodes.connect("n2", "127.0.0.1:1")
    for silent in ("n2", "n3"):
        with pytest.raises(Unavailable) as failure:
            await nodes.get_instance(silent, "qa-1")
        assert failure.value.reason == "NODE_UNAVAILABLE"


async def test_a_closed_connection_fails_the_calls_on_it(node: Connected) -> None:
    nodes, snapshotd, _ = node

    async def forever() -> Message:
        await asyncio.Event().wait()
        return SERVING

    snapshotd.outcome = forever
    stream = nodes.generate("n1", b"\x0a\x01x", None)
    await stream.read()
    rest = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0)
    await nodes.disconnect("n1")
    with pytest.raises(Unavailable) as failure:
        await rest
    assert failure.value.reason == "NODE_UNAVAILABLE"


async def test_a_stream_passes_bytes_and_its_deadline(node: Connected) -> None:
    nodes, _, inference = node
    inference.hang.set()
    stream = nodes.generate("n1", b"\x0a\x01x", 9.0)
    frames = [await stream.read(), await stream.read(), await stream.read()]
    assert frames == [b"\x12\x03\n\x01a", b"\x1a\x00", None]
    assert inference.received == [b"\x0a\x01x"]
    assert inference.time_left[0] == pytest.approx(9.0, abs=1.0)


async def test_closing_a_stream_cancels_it_on_the_node(node: Connected) -> None:
    nodes, _, inference = node
    stream = nodes.generate("n1", b"\x0a\x01x", None)
    await stream.read()
    stream.cancel()
    async with asyncio.timeout(5):
        await inference.ended.wait()
    assert not inference.hang.is_set()


async def test_the_callers_deadline_is_the_callers_error(node: Connected) -> None:
    nodes, _, _ = node
    stream = nodes.generate("n1", b"\x0a\x01x", 0.2)
    await stream.read()
    with pytest.raises(DeadlineExceeded):
        await stream.read()


class Told(grpc.aio.ServerInterceptor):
    """Writes down what the metadata of each call says of its sender."""

    def __init__(self) -> None:
        self.sessions: list[tuple[str, str]] = []

    async def intercept_service(
        self, continuation: Any, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        metadata = {key: str(value) for key, value in handler_call_details.invocation_metadata or ()}
        self.sessions.append((metadata.get(SESSION_KEY, ""), metadata.get(SESSIONS_KEY, "")))
        return await continuation(handler_call_details)


async def test_a_node_is_told_with_each_command_whose_session_it_comes_from() -> None:
    told, ended, snapshotd = Told(), list[int](), Snapshotd()
    living = Sessions(9, frozenset({7, 9}))
    nodes = GrpcNodes("controller", 7, lambda: living, ended.append)
    server = new_server("snapshotd.dumont", interceptors=(told,))
    instance_service_pb2_grpc.add_InstanceServiceServicer_to_server(snapshotd, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    await nodes.connect("n1", address)
    await nodes.park("n1", "qa-1")
    async with aclosing(nodes.watch("n1")) as changes:
        await anext(changes)
    living = Sessions(9, frozenset({7}))
    # The node was given up meanwhile.
    await nodes.disconnect("n1")
    await nodes.connect("n1", address)
    await nodes.park("n1", "qa-1")
    await nodes.close()
    await server.stop(0)
    assert told.sessions == [("7.1", "9:7,9"), ("7.1", "9:7,9"), ("7.2", "9:7")]


async def test_a_controller_whose_session_has_ended_is_told_by_the_node(tmp_path: Path) -> None:
    ownership, ended = Ownership(tmp_path / "controller"), list[int]()
    await ownership.learn(Sessions(9, frozenset({9})))
    server = new_server("snapshotd.dumont", interceptors=(OwnershipInterceptor(ownership),))
    instance_service_pb2_grpc.add_InstanceServiceServicer_to_server(Snapshotd(), server)
    nodes = GrpcNodes("controller", 7, Sessions, ended.append)
    await nodes.connect("n1", bind(server, "127.0.0.1:0"))
    await server.start()
    with pytest.raises(Aborted) as failure:
        await nodes.park("n1", "qa-1")
    assert (failure.value.reason, ended) == ("SESSION_ENDED", [9])
    await nodes.close()
    await server.stop(0)

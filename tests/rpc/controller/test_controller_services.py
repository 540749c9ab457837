"""The API as its callers see it: order of a stream, error details, deadlines, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from controller.main import DOMAIN, LIMITS, SERVICES
from controller.model import Node, NodeState
from controller.service.inference import SERVICE as INFERENCE_SERVICE
from controller.service.inference import InferenceService
from dumont.controller.v1 import deployment_service_pb2 as deployments
from dumont.controller.v1 import (
    deployment_service_pb2_grpc,
    inference_service_pb2_grpc,
    instance_service_pb2_grpc,
    node_service_pb2_grpc,
    snapshot_service_pb2_grpc,
)
from dumont.controller.v1 import inference_service_pb2 as inference
from dumont.controller.v1 import instance_service_pb2 as instances
from dumont.controller.v1 import node_service_pb2 as node_pb
from dumont.controller.v1 import snapshot_service_pb2 as snapshots
from dumont.errors import Internal, ResourceExhausted, Unavailable
from dumont.inference.v1 import inference_pb2
from dumont.rpc.server import bind, new_server
from dumont.rpc.status import from_rpc_error
from dumont.snapshotd.v1 import inference_service_pb2 as downstream
from tests.rpc.controller.conftest import Served


def frames(*texts: str) -> list[bytes]:
    """Frames as a model host writes them."""
    chunks = [downstream.GenerateResponse(chunk=inference_pb2.TextChunk(text=text)) for text in texts]
    finish = inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_END)
    return [m.SerializeToString() for m in (*chunks, downstream.GenerateResponse(finish=finish))]


async def create(served: Served, identifier: str = "qa", **fields: Any) -> deployments.Deployment:
    stub = deployment_service_pb2_grpc.DeploymentServiceStub(served.channel)
    wanted: dict[str, Any] = {"model": "org/model", "start_mode": deployments.START_MODE_CHECKPOINT} | fields
    return await stub.CreateDeployment(
        deployments.CreateDeploymentRequest(
            deployment_id=identifier, deployment=deployments.Deployment(**wanted)
        )
    )


def generate(served: Served, timeout: float | None = None, **fields: Any) -> Any:
    stub = inference_service_pb2_grpc.InferenceServiceStub(served.channel)
    wanted = {"deployment": "deployments/qa", "prompt": "Hello"} | fields
    return stub.Generate(inference.GenerateRequest(**wanted), timeout=timeout)


async def until(predicate: Callable[[], bool]) -> None:
    """Wait for what a call on its way will bring about."""
    async with asyncio.timeout(30):
        while not predicate():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def details(error: grpc.aio.AioRpcError) -> dict[type, Any]:
    status = rpc_status.from_call(error)
    found: dict[type, Any] = {}
    for detail in status.details:
        for kind in (ErrorInfo, BadRequest, RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                found[kind] = kind()
                detail.Unpack(found[kind])
    return found


async def test_the_stream_is_start_then_chunks_then_finish(served: Served) -> None:
    await create(served)
    served.nodes.frames = frames("Par", "is")

    answer = [message async for message in generate(served, max_new_tokens=8, stop=["x"])]

    assert [message.WhichOneof("event") for message in answer] == ["start", "chunk", "chunk", "finish"]
    start = answer[0].start
    assert start.tier == inference.TIER_COLD
    assert start.node == "nodes/n1"
    assert start.reasons
    assert start.total_duration.ToTimedelta().total_seconds() > 0
    assert "".join(message.chunk.text for message in answer[1:3]) == "Paris"


async def test_the_node_gets_the_request_with_its_instance_named(served: Served) -> None:
    await create(served)
    answer = [m async for m in generate(served, temperature=0.0, seed=7, top_p=0.5)]
    (call,) = served.nodes.named("generate")
    sent = downstream.GenerateRequest.FromString(call[2].encode("latin-1"))
    assert sent.name == answer[0].start.instance
    assert (sent.prompt, sent.seed, sent.max_new_tokens, sent.top_p) == ("Hello", 7, 256, 0.5)
    assert sent.HasField("temperature")


async def test_bytes_the_controller_cannot_read_pass_through(served: Served) -> None:
    await create(served)
    # Field 99 is of a newer version.
    newer = b"\x12\x03\n\x01a\x9a\x06\x01x"
    served.nodes.frames = [newer]
    raw: Any = served.channel.unary_stream("/dumont.controller.v1.InferenceService/Generate")
    request = inference.GenerateRequest(deployment="deployments/qa", prompt="x").SerializeToString()
    received = [frame async for frame in raw(request)]
    assert received[1] == newer


async def test_a_second_request_is_resident(served: Served) -> None:
    await create(served)
    [m async for m in generate(served)]
    answer = [m async for m in generate(served)]
    assert answer[0].start.tier == inference.TIER_RESIDENT


@pytest.mark.parametrize(
    ("fields", "code", "reason", "field"),
    [
        ({"prompt": ""}, "INVALID_ARGUMENT", "EMPTY_PROMPT", "prompt"),
        ({"max_new_tokens": 5000}, "INVALID_ARGUMENT", "INVALID_MAX_NEW_TOKENS", "max_new_tokens"),
        ({"deployment": "nodes/qa"}, "INVALID_ARGUMENT", "INVALID_NAME", "deployment"),
        ({"deployment": "deployments/no"}, "NOT_FOUND", "DEPLOYMENT_NOT_FOUND", None),
    ],
)
async def test_bad_input_carries_its_reason_and_field(
    served: Served, fields: dict[str, Any], code: str, reason: str, field: str | None
) -> None:
    await create(served)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        [m async for m in generate(served, **fields)]
    assert failure.value.code().name == code
    found = details(failure.value)
    assert (found[ErrorInfo].reason, found[ErrorInfo].domain) == (reason, "controller.dumont")
    if field:
        assert found[BadRequest].field_violations[0].field == field
    assert served.nodes.named("start") == []


async def test_a_malformed_message_is_refused(served: Served) -> None:
    service = "/dumont.controller.v1.InferenceService/"
    channel: Any = served.channel
    for call in (
        channel.unary_unary(service + "Embed")(b"\xff\xff"),
        anext(aiter(channel.unary_stream(service + "Generate")(b"\xff\xff"))),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        assert details(failure.value)[ErrorInfo].reason == "MALFORMED_REQUEST"


async def test_a_request_that_no_node_takes_is_refused_before_it_waits_for_one(served: Served) -> None:
    await create(served)
    service = "/dumont.controller.v1.InferenceService/"
    channel: Any = served.channel
    prompt = inference.GenerateRequest(deployment="deployments/qa", prompt="x" * 4 * 1024 * 1024)
    inputs = inference.EmbedRequest(deployment="deployments/qa", inputs=["x" * 1024 * 1024] * 4)
    for call in (
        channel.unary_unary(service + "Embed")(inputs.SerializeToString()),
        anext(aiter(channel.unary_stream(service + "Generate")(prompt.SerializeToString()))),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(failure.value)[ErrorInfo].reason == "REQUEST_TOO_LARGE"
    assert served.nodes.named("start") == []


async def test_settings_are_refused_with_their_path(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await create(served, checkpoint=deployments.CheckpointSettings(ttl=Duration(seconds=-1)))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    violation = details(failure.value)[BadRequest].field_violations[0]
    assert (violation.field, violation.reason) == ("deployment.checkpoint.ttl", "NEGATIVE_DURATION")


async def test_an_error_after_the_first_token_ends_the_stream(served: Served) -> None:
    await create(served)
    served.nodes.frames = frames("Par", "is")
    served.nodes.fail("frame 0", Internal("DECODE_FAILED", "broken"))
    call = generate(served)
    received = [(await call.read()).WhichOneof("event") for _ in range(2)]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    assert received == ["start", "chunk"]
    assert details(failure.value)[ErrorInfo].reason == "DECODE_FAILED"


async def test_a_busy_node_says_when_to_come_back(served: Served) -> None:
    await create(served)
    busy = Unavailable("QUEUE_FULL", "too many", retry_after=2.5)
    served.nodes.fail("generate", busy, busy)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        [m async for m in generate(served)]
    assert details(failure.value)[RetryInfo].retry_delay.ToTimedelta().total_seconds() == 2.5


async def test_a_thousand_first_requests_at_once_are_answered_by_one_start(served: Served) -> None:
    # given
    await create(served)
    held = served.nodes.hold("start")

    async def ask() -> list[str]:
        return [message.WhichOneof("event") async for message in generate(served)]

    # when: all of them wait
    asking = [asyncio.create_task(ask()) for _ in range(999)]
    await served.nodes.called("start")
    await until(lambda: served.controller.starts.waiting("qa") == len(asking))
    held.set()

    # then
    answers = await asyncio.gather(*asking)
    assert {answer[0] for answer in answers} == {"start"}
    assert len(served.nodes.named("start")) == 1
    assert len(served.nodes.named("generate")) == len(asking)
    assert served.controller.starts.waiting("qa") == 0


async def test_a_full_queue_says_why_and_when_to_come_back(served: Served) -> None:
    await create(served)
    served.nodes.fail("generate", *[ResourceExhausted("QUEUE_FULL", "no room", retry_after=0.0)] * 50)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        [m async for m in generate(served)]
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(failure.value)[ErrorInfo].reason == "QUEUE_FULL"
    assert RetryInfo in details(failure.value)


async def test_a_caller_who_waits_and_leaves_leaves_the_queue_at_once(served: Served) -> None:
    await create(served)
    served.nodes.hold("start")
    patient, leaving = generate(served), generate(served)
    hasty = generate(served, timeout=0.3)
    await until(lambda: served.controller.starts.waiting("qa") == 3)

    leaving.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await hasty.read()

    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: served.controller.starts.waiting("qa") == 1)
    patient.cancel()


async def test_a_caller_who_never_reads_holds_little_and_blocks_nobody(served: Served) -> None:
    # given: an answer far larger than what gRPC buffers for a caller
    await create(served)
    [m async for m in generate(served)]
    served.nodes.frames = [frames("x" * 65536)[0]] * 1000
    served.nodes.frames_read = 0

    # when
    idle = generate(served)
    await idle.read()
    before = -1
    while before != served.nodes.frames_read:
        before = served.nodes.frames_read
        await asyncio.sleep(0.3)

    # then
    assert 0 < served.nodes.frames_read < 500
    served.nodes.frames = frames("Par", "is")
    assert len([m async for m in generate(served)]) == 4
    idle.cancel()


async def test_a_cancelled_call_is_cancelled_on_the_node(served: Served) -> None:
    await create(served)
    served.nodes.frames = frames("Par", "is")
    served.nodes.hold("frame 0")
    call = generate(served)
    assert (await call.read()).WhichOneof("event") == "start"
    assert (await call.read()).WhichOneof("event") == "chunk"
    (instance,) = served.controller.core.inventory.instances.values()
    assert instance.in_flight == 1

    call.cancel()

    async with asyncio.timeout(5):
        await served.controller.core.inventory.until(
            lambda: served.controller.core.inventory.instances[instance.id].in_flight == 0
        )
    assert [c[0] for c in served.nodes.cancelled] == ["generate"]


async def test_a_deadline_travels_on_and_ends_the_call(served: Served) -> None:
    await create(served)
    [m async for m in generate(served)]
    served.nodes.hold("generate")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        [m async for m in generate(served, timeout=0.3)]
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert served.nodes.timeouts[0] is None
    assert 0 < (served.nodes.timeouts[1] or 0) < 0.3
    (instance,) = served.controller.core.inventory.instances
    async with asyncio.timeout(5):
        await served.controller.core.inventory.until(
            lambda: served.controller.core.inventory.instances[instance].in_flight == 0
        )


async def test_embeddings_come_with_their_start(served: Served) -> None:
    served.nodes.models["org/model"] = "embedding"
    await create(served)
    answer = downstream.EmbedResponse(embeddings=[inference_pb2.Embedding(values=[1.0, 2.0])])
    served.nodes.frames = [answer.SerializeToString()]
    stub = inference_service_pb2_grpc.InferenceServiceStub(served.channel)
    response = await stub.Embed(inference.EmbedRequest(deployment="deployments/qa", inputs=["a"]))
    assert response.start.tier == inference.TIER_COLD
    assert list(response.embeddings[0].values) == [1.0, 2.0]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        [m async for m in generate(served)]
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(failure.value)[ErrorInfo].reason == "WRONG_ENGINE"


async def test_a_deployment_is_explained_and_its_instance_says_why_it_is_there(served: Served) -> None:
    await create(served)
    stub = deployment_service_pb2_grpc.DeploymentServiceStub(served.channel)
    request = deployments.ExplainDeploymentRequest(name="deployments/qa")
    before = await stub.ExplainDeployment(request)
    assert before.decision == "cold on nodes/n1: no instance and no usable snapshot"
    assert [(one.tier, one.node) for one in before.candidates] == [(inference.TIER_COLD, "nodes/n1")]
    assert before.candidates[0].start_duration.seconds > 0
    assert before.candidates[0].basis

    await generate(served, prompt="Hello").read()

    after = await stub.ExplainDeployment(request)
    assert after.decision.startswith("resident on nodes/n1")
    (known,) = (
        await instance_service_pb2_grpc.InstanceServiceStub(served.channel).ListInstances(
            instances.ListInstancesRequest()
        )
    ).instances
    assert known.reasons[0] == "cold start: no instance and no usable snapshot"
    assert any("yields to" in reason for reason in known.reasons)
    assert any("it would be back in" in reason for reason in known.reasons)


async def test_instances_are_watched_parked_resumed_read_and_stopped(served: Served) -> None:
    await create(served)
    answer = [m async for m in generate(served)]
    name = answer[0].start.instance
    stub = instance_service_pb2_grpc.InstanceServiceStub(served.channel)
    watch: Any = stub.WatchInstances(instances.WatchInstancesRequest())
    first = await watch.read()
    assert (first.instance.name, first.instance.state) == (name, instances.Instance.STATE_SERVING)
    assert (await watch.read()).HasField("synchronized")

    parked = await stub.ParkInstance(instances.ParkInstanceRequest(name=name))
    assert parked.state == instances.Instance.STATE_PARKED
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.ParkInstance(instances.ParkInstanceRequest(name=name))
    assert details(failure.value)[ErrorInfo].reason == "ILLEGAL_TRANSITION"
    resumed = await stub.ResumeInstance(instances.ResumeInstanceRequest(name=name))
    assert resumed.state == instances.Instance.STATE_SERVING
    assert resumed.deployment == "deployments/qa"

    logs = stub.StreamInstanceLogs(instances.StreamInstanceLogsRequest(name=name))
    assert [part.data async for part in logs] == [b"loaded\n"]
    listed = await stub.ListInstances(instances.ListInstancesRequest(deployment="deployments/qa"))
    assert [instance.name for instance in listed.instances] == [name]

    await stub.StopInstance(instances.StopInstanceRequest(name=name))
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.GetInstance(instances.GetInstanceRequest(name=name))
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    async with asyncio.timeout(5):
        while (change := await watch.read()).WhichOneof("change") != "removed":
            assert change.instance.name == name
    assert change.removed == name
    watch.cancel()


async def test_a_snapshot_is_made_by_an_operation_listed_and_deleted(served: Served) -> None:
    await create(served)
    stub = snapshot_service_pb2_grpc.SnapshotServiceStub(served.channel)
    operation = await stub.CreateSnapshot(
        snapshots.CreateSnapshotRequest(deployment="deployments/qa", snapshot_id="mine")
    )
    waited = await operations_pb2_grpc.OperationsStub(served.channel).WaitOperation(
        operations_pb2.WaitOperationRequest(name=operation.name, timeout=Duration(seconds=5))
    )
    made, metadata = snapshots.Snapshot(), snapshots.CreateSnapshotMetadata()
    assert waited.done
    assert waited.response.Unpack(made)
    assert waited.metadata.Unpack(metadata)
    assert (made.name, made.deployment, metadata.stage) == ("snapshots/mine", "deployments/qa", "capturing")
    assert made.expire_time.seconds > made.create_time.seconds

    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.CreateSnapshot(
            snapshots.CreateSnapshotRequest(deployment="deployments/qa", snapshot_id="mine")
        )
    assert failure.value.code() is grpc.StatusCode.ALREADY_EXISTS

    listed = await stub.ListSnapshots(snapshots.ListSnapshotsRequest(deployment="deployments/qa"))
    assert [snapshot.name for snapshot in listed.snapshots] == ["snapshots/mine"]
    await stub.DeleteSnapshot(snapshots.DeleteSnapshotRequest(name="snapshots/mine"))
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.GetSnapshot(snapshots.GetSnapshotRequest(name="snapshots/mine"))
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_prefetch_names_the_node_that_holds_it_then_and_refuses_one_without_reach(
    served: Served,
) -> None:
    await create(served)
    stub = snapshot_service_pb2_grpc.SnapshotServiceStub(served.channel)
    operations = operations_pb2_grpc.OperationsStub(served.channel)

    async def ended(operation: operations_pb2.Operation) -> operations_pb2.Operation:
        return await operations.WaitOperation(
            operations_pb2.WaitOperationRequest(name=operation.name, timeout=Duration(seconds=5))
        )

    request = snapshots.CreateSnapshotRequest(deployment="deployments/qa", snapshot_id="mine")
    await ended(await stub.CreateSnapshot(request))
    operation = await ended(
        await stub.PrefetchSnapshot(snapshots.PrefetchSnapshotRequest(name="snapshots/mine", node="nodes/n1"))
    )
    found, metadata = snapshots.Snapshot(), snapshots.PrefetchSnapshotMetadata()
    assert operation.response.Unpack(found)
    assert operation.metadata.Unpack(metadata)
    assert (found.name, found.node, found.local) == ("snapshots/mine", "nodes/n1", True)
    assert (metadata.snapshot, metadata.node) == ("snapshots/mine", "nodes/n1")

    for name, node in (("snapshots/other", ""), ("snapshots/mine", "nodes/other")):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.PrefetchSnapshot(snapshots.PrefetchSnapshotRequest(name=name, node=node))
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_migration_is_an_operation_with_stages(served: Served) -> None:
    # given: an instance on one of two nodes without an object store
    await create(served)
    first, *_ = [m async for m in generate(served)]
    start = first.start
    served.nodes.add_node("n2")
    await served.controller.core.fleet.register(Node("n2", "n2:7071", checkpoint_capable=True))
    await until(lambda: served.controller.core.inventory.nodes["n2"].state is NodeState.READY)
    stub = instance_service_pb2_grpc.InstanceServiceStub(served.channel)

    # when: it is refused without a cold start, and then allowed
    request = instances.MigrateInstanceRequest(name=start.instance, node="nodes/n2")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.MigrateInstance(request)
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(failure.value)[ErrorInfo].reason == "NO_SHARED_STORE"
    request.cold = True
    operation = await stub.MigrateInstance(request)

    # then
    waited = await operations_pb2_grpc.OperationsStub(served.channel).WaitOperation(
        operations_pb2.WaitOperationRequest(name=operation.name, timeout=Duration(seconds=5))
    )
    made, metadata = instances.Instance(), instances.MigrateInstanceMetadata()
    assert waited.done
    assert waited.response.Unpack(made)
    assert waited.metadata.Unpack(metadata)
    assert (made.node, made.deployment) == ("nodes/n2", "deployments/qa")
    assert (metadata.instance, metadata.stage) == (start.instance, "draining")
    first, *_ = [m async for m in generate(served)]
    assert first.start.instance == made.name


async def test_a_failed_capture_is_the_operations_error(served: Served) -> None:
    await create(served)
    served.nodes.fail("capture", Internal("DUMP_FAILED", "criu said no"))
    stub = snapshot_service_pb2_grpc.SnapshotServiceStub(served.channel)
    operation = await stub.CreateSnapshot(snapshots.CreateSnapshotRequest(deployment="deployments/qa"))
    waited = await operations_pb2_grpc.OperationsStub(served.channel).WaitOperation(
        operations_pb2.WaitOperationRequest(name=operation.name, timeout=Duration(seconds=5))
    )
    info = ErrorInfo()
    assert waited.error.details[0].Unpack(info)
    assert info.reason == "DUMP_FAILED"


async def test_nodes_register_beat_and_are_listed(served: Served) -> None:
    stub = node_service_pb2_grpc.NodeServiceStub(served.channel)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Heartbeat(node_pb.HeartbeatRequest(name="nodes/n2"))
    assert details(failure.value)[ErrorInfo].reason == "NODE_UNKNOWN"
    served.nodes.add_node("n2")
    answer = await stub.RegisterNode(
        node_pb.RegisterNodeRequest(
            node_id="n2", node=node_pb.Node(endpoint="127.0.0.1:9", checkpoint_capable=True)
        )
    )
    assert answer.heartbeat_interval.seconds == 5
    await stub.Heartbeat(node_pb.HeartbeatRequest(name="nodes/n2", memory_available_bytes=77))
    known = await stub.GetNode(node_pb.GetNodeRequest(name="nodes/n2"))
    assert known.memory_available_bytes == 77
    gpu = node_pb.NodeGpu(uuid="GPU-a", model="H", memory_total_bytes=9, memory_free_bytes=4)
    beat = node_pb.HeartbeatRequest(name="nodes/n2", gpus=[gpu], disk_free_bytes=5, weight_cache_bytes=6)
    await stub.Heartbeat(beat)
    known = await stub.GetNode(node_pb.GetNodeRequest(name="nodes/n2"))
    assert list(known.gpus) == [gpu]
    assert (known.disk_free_bytes, known.weight_cache_bytes) == (5, 6)
    assert known.memory_available_bytes == 77
    listed = await stub.ListNodes(node_pb.ListNodesRequest())
    assert [node.name for node in listed.nodes] == ["nodes/n1", "nodes/n2"]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.RegisterNode(
            node_pb.RegisterNodeRequest(node_id="n3", node=node_pb.Node(endpoint="nonsense"))
        )
    assert details(failure.value)[BadRequest].field_violations[0].field == "node.endpoint"


async def test_every_service_is_healthy_and_reflected(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    for service in ("", *SERVICES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)

    async def asked() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="dumont.controller.v1.InferenceService"
        )

    listed, described = [response async for response in stub.ServerReflectionInfo(asked())]
    assert set(SERVICES) <= {service.name for service in listed.list_services_response.service}
    assert described.file_descriptor_response.file_descriptor_proto


async def test_an_answer_that_nobody_reads_releases_its_instance(served: Served) -> None:
    # given: an answer that does not fit what gRPC holds for a reader, and a caller without a deadline
    await create(served)
    served.nodes.frames = [b"x" * 100_000] * 100
    server = new_server(DOMAIN, LIMITS)
    InferenceService(served.controller.serving, 4096, write_seconds=0.3).register(server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        request = inference.GenerateRequest(deployment="deployments/qa", prompt="Hello")
        stream: Any = channel.unary_stream(f"/{INFERENCE_SERVICE}/Generate")
        call = stream(request.SerializeToString())
        await call.read()
        (instance,) = served.controller.core.inventory.instances.values()
        assert instance.in_flight == 1

        # then: after a while the instance is as free as if the answer had ended
        async with asyncio.timeout(5):
            await served.controller.core.inventory.until(
                lambda: served.controller.core.inventory.instance(instance.id).in_flight == 0
            )
            # The node hears of it as soon as the answer's task gets to run.
            while not served.nodes.cancelled:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert [method for method, *_ in served.nodes.cancelled] == ["generate"]

        # and: whoever reads on is told
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await read_all(call)
        assert from_rpc_error(raised.value).reason == "STREAM_NOT_READ"
        assert served.controller.core.inventory.instance(instance.id).in_flight == 0
    await server.stop(0)


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass

"""Converts the controller's messages to ``dumont.types``."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dumont import types
from dumont.controller.v1 import (
    deployment_service_pb2,
    inference_service_pb2,
    instance_service_pb2,
    node_service_pb2,
    snapshot_service_pb2,
)
from dumont.inference.v1 import inference_pb2
from dumont.rpc.structs import from_struct

NANOSECONDS: Final = 1e9


def word(enum: Any, value: int, prefix: str) -> str:
    """``STATE_SERVING`` is ``"serving"``. A value newer than this client is ``"unknown-7"``."""
    try:
        name: str = enum.Name(value)
    except ValueError:
        return f"unknown-{value}"
    return name.removeprefix(prefix).lower()


def seconds(duration: Duration) -> float:
    """The seconds of a duration."""
    return duration.ToNanoseconds() / NANOSECONDS


def duration(value: float) -> Duration:
    """Seconds as a message."""
    result = Duration()
    result.FromNanoseconds(round(value * NANOSECONDS))
    return result


def optional_seconds(message: Any, field: str) -> float | None:
    """The seconds of a duration field; None if it is unset."""
    return seconds(getattr(message, field)) if message.HasField(field) else None


def time(message: Any, field: str) -> datetime | None:
    """The time of a timestamp field; None if it is unset."""
    if not message.HasField(field):
        return None
    stamp: Timestamp = getattr(message, field)
    return stamp.ToDatetime(tzinfo=UTC)


def phases(messages: Iterable[Any]) -> tuple[types.Phase, ...]:
    """The phases of a message."""
    return tuple(types.Phase(message.name, seconds(message.duration)) for message in messages)


def start_info(message: inference_service_pb2.StartInfo) -> types.StartInfo:
    """How a start went."""
    return types.StartInfo(
        tier=word(inference_service_pb2.Tier, message.tier, "TIER_"),
        reasons=tuple(message.reasons),
        phases=phases(message.phases),
        seconds=seconds(message.total_duration),
        instance=message.instance,
        node=message.node,
    )


def start_progress(message: deployment_service_pb2.WatchStartResponse) -> types.StartProgress:
    """How far a start is."""
    return types.StartProgress(
        message.running, message.stage, message.instance, message.node, message.snapshot
    )


def usage(message: inference_pb2.Usage) -> types.Usage:
    """The tokens of an answer."""
    return types.Usage(message.prompt_tokens, message.output_tokens, message.cached_prompt_tokens)


def piece(message: inference_pb2.TextChunk) -> types.Piece:
    """A piece of an answer."""
    return types.Piece(
        text=message.text,
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(
            types.TokenLogprob(
                token.token_id,
                token.text,
                token.logprob,
                tuple(types.TopLogprob(top.token_id, top.text, top.logprob) for top in token.top),
            )
            for token in message.logprobs
        ),
    )


def finish_reason(message: inference_pb2.Finish) -> str:
    """Why an answer ended, as a lower-case word."""
    return word(inference_pb2.FinishReason, message.reason, "FINISH_REASON_")


def deployment(message: deployment_service_pb2.Deployment) -> types.DeploymentInfo:
    """A deployment."""
    checkpoint = message.checkpoint
    return types.DeploymentInfo(
        name=message.name,
        uid=message.uid,
        model=message.model,
        engine=message.engine,
        start_mode=word(deployment_service_pb2.StartMode, message.start_mode, "START_MODE_"),
        checkpoint=types.CheckpointSettings(
            enabled=checkpoint.enabled,
            ttl=optional_seconds(checkpoint, "ttl"),
            storage=word(deployment_service_pb2.Storage, checkpoint.storage, "STORAGE_"),
            weights=word(deployment_service_pb2.Weights, checkpoint.weights, "WEIGHTS_"),
        ),
        idle_timeout=optional_seconds(message, "idle_timeout"),
        park_timeout=optional_seconds(message, "park_timeout"),
        priority=message.priority,
        min_instances=message.min_instances,
        # A controller of an earlier version has one instance of each.
        max_instances=message.max_instances or 1,
        engine_options=from_struct(message.engine_options),
        state=word(deployment_service_pb2.Deployment.State, message.state, "STATE_"),
        state_message=message.state_message,
        create_time=time(message, "create_time"),
        update_time=time(message, "update_time"),
        last_use_time=time(message, "last_use_time"),
    )


def explanation(message: deployment_service_pb2.ExplainDeploymentResponse) -> types.Explanation:
    """What a request to a deployment would do."""
    return types.Explanation(
        message.decision,
        tuple(
            types.StartCandidate(
                tier=word(inference_service_pb2.Tier, one.tier, "TIER_"),
                node=one.node,
                gpu=one.gpu,
                instance=one.instance,
                snapshot=one.snapshot,
                start_seconds=seconds(one.start_duration),
                room_seconds=seconds(one.room_duration),
                basis=one.basis,
                yields=tuple(one.yields),
                why_not=one.why_not,
            )
            for one in message.candidates
        ),
    )


def instance(message: instance_service_pb2.Instance) -> types.Instance:
    """An instance."""
    return types.Instance(
        name=message.name,
        deployment=message.deployment,
        node=message.node,
        state=word(instance_service_pb2.Instance.State, message.state, "STATE_"),
        pid=message.pid,
        device=message.device,
        memory_bytes=message.memory_bytes,
        snapshot=message.snapshot,
        create_time=time(message, "create_time"),
        last_use_time=time(message, "last_use_time"),
        phases=phases(message.phases),
        failure_reason=message.failure_reason,
        failure_message=message.failure_message,
        orphan=message.orphan,
        capacity=capacity(message.capacity) if message.HasField("capacity") else None,
        load=types.Load(message.load.running, message.load.waiting, message.load.kv_tokens_used),
        in_flight=message.in_flight,
        gpu_bytes=message.gpu_bytes,
        ram_bytes=message.ram_bytes,
        reasons=tuple(message.reasons),
        gpu=message.gpu,
        draining=message.draining,
    )


def capacity(message: inference_pb2.Capacity) -> types.Capacity:
    """How much an instance computes at once."""
    kv_tokens = message.kv_tokens if message.HasField("kv_tokens") else None
    return types.Capacity(message.sequences, kv_tokens, message.unbatched_reason)


def snapshot(message: snapshot_service_pb2.Snapshot) -> types.Snapshot:
    """A snapshot."""
    return types.Snapshot(
        name=message.name,
        deployment=message.deployment,
        node=message.node,
        model=message.model,
        state=word(snapshot_service_pb2.Snapshot.State, message.state, "STATE_"),
        create_time=time(message, "create_time"),
        last_use_time=time(message, "last_use_time"),
        expire_time=time(message, "expire_time"),
        size_bytes=message.size_bytes,
        source_pause_seconds=seconds(message.source_pause_duration),
        compatibility=dict(message.compatibility),
        files=tuple(types.SnapshotFile(file.name, file.size_bytes, file.digest) for file in message.files),
        manifest_digest=message.manifest_digest,
        quarantine_reason=message.quarantine_reason,
        local=message.local,
        published=message.published,
        stored=stored(message.stored) if message.HasField("stored") else None,
        orphan=message.orphan,
    )


def stored(message: snapshot_service_pb2.StoredSnapshot) -> types.StoredSnapshot:
    """A snapshot's space in the object store."""
    return types.StoredSnapshot(
        image_bytes=message.image_bytes,
        data_bytes=message.data_bytes,
        stored_bytes=message.stored_bytes,
        unique_bytes=message.unique_bytes,
        chunk_count=message.chunk_count,
        encrypted=message.encrypted,
        signer=message.signer,
    )


def node_model(message: node_service_pb2.NodeModel) -> types.NodeModel:
    """A model that a node has."""
    return types.NodeModel(
        message.model, message.node, message.engine, message.weights_size_bytes, message.problem
    )


def node(message: node_service_pb2.Node) -> types.Node:
    """A node."""
    return types.Node(
        name=message.name,
        endpoint=message.endpoint,
        state=word(node_service_pb2.Node.State, message.state, "STATE_"),
        version=message.version,
        gpu_models=tuple(message.gpu_models),
        memory_total_bytes=message.memory_total_bytes,
        memory_available_bytes=message.memory_available_bytes,
        cpu_count=message.cpu_count,
        checkpoint_capable=message.checkpoint_capable,
        heartbeat_time=time(message, "heartbeat_time"),
        findings=tuple(types.Finding(f.check, f.passed, f.message) for f in message.findings),
        object_store=message.object_store,
        snapshot_bytes=message.snapshot_bytes,
        snapshot_limit_bytes=message.snapshot_limit_bytes,
        draining=message.draining,
        engines=dict(message.engines),
        gpus=tuple(
            types.NodeGpu(
                gpu.uuid, gpu.model, gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.memory_other_bytes
            )
            for gpu in message.gpus
        ),
        instance_memory_bytes=message.instance_memory_bytes,
        instance_memory_limit_bytes=message.instance_memory_limit_bytes,
        parked_memory_bytes=message.parked_memory_bytes,
        parked_memory_limit_bytes=message.parked_memory_limit_bytes,
    )


def remainders(message: node_service_pb2.DrainNodeResponse) -> tuple[types.Remainder, ...]:
    """What is left on a node that was drained."""
    return tuple(
        types.Remainder(left.instance, left.deployment, left.reason, left.message) for left in message.left
    )

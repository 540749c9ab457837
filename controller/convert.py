"""Converts protocol messages to facts and back. Bad input stops here, with the field named."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from controller.balance import Remainder
from controller.deployments import Draft
from controller.model import (
    Capacity,
    Deployment,
    DeploymentState,
    Finding,
    Gpu,
    Instance,
    InstanceState,
    Load,
    Node,
    NodeState,
    Phase,
    Report,
    Snapshot,
    SnapshotFile,
    StartInfo,
    StartMode,
    Storage,
    StoredSnapshot,
    Tier,
    Weights,
)
from controller.policy import Candidate
from controller.room import NoRoom, Room
from dumont import engines
from dumont.controller.v1 import deployment_service_pb2 as deployments_pb
from dumont.controller.v1 import inference_service_pb2 as inference_pb
from dumont.controller.v1 import instance_service_pb2 as instances_pb
from dumont.controller.v1 import node_service_pb2 as nodes_pb
from dumont.controller.v1 import snapshot_service_pb2 as snapshots_pb
from dumont.errors import InvalidArgument
from dumont.inference.v1 import inference_pb2 as inference_words
from dumont.rpc.structs import from_struct, to_struct
from dumont.snapshotd.v1 import instance_service_pb2 as node_instances_pb
from dumont.snapshotd.v1 import snapshot_service_pb2 as node_snapshots_pb

TEN_YEARS: Final = 10 * 365 * 86400
MODEL_LIMIT: Final = 1024
HIGHEST_PRIORITY: Final = 1000
MOST_INSTANCES: Final = 1000
MODES: Final = {
    deployments_pb.START_MODE_COLD: StartMode.COLD,
    deployments_pb.START_MODE_WARM: StartMode.WARM,
    deployments_pb.START_MODE_CHECKPOINT: StartMode.CHECKPOINT,
}
EVERYTHING: Final = frozenset(
    {
        "model",
        "engine",
        "start_mode",
        "checkpoint",
        "idle_timeout",
        "park_timeout",
        "priority",
        "min_instances",
        "max_instances",
        "engine_options",
    }
)
MODES_BACK: Final = {mode: value for value, mode in MODES.items()}
STORAGES: Final = {
    deployments_pb.STORAGE_UNSPECIFIED: Storage.LOCAL,
    deployments_pb.STORAGE_LOCAL: Storage.LOCAL,
    deployments_pb.STORAGE_S3: Storage.S3,
}
STORAGES_BACK: Final = {
    Storage.LOCAL: deployments_pb.STORAGE_LOCAL,
    Storage.S3: deployments_pb.STORAGE_S3,
}
WEIGHTS: Final = {
    deployments_pb.WEIGHTS_UNSPECIFIED: Weights.DETACHED,
    deployments_pb.WEIGHTS_DETACHED: Weights.DETACHED,
    deployments_pb.WEIGHTS_INCLUDED: Weights.INCLUDED,
}
WEIGHTS_BACK: Final = {
    Weights.DETACHED: deployments_pb.WEIGHTS_DETACHED,
    Weights.INCLUDED: deployments_pb.WEIGHTS_INCLUDED,
}
TIERS: Final = {
    Tier.RESIDENT: inference_pb.TIER_RESIDENT,
    Tier.PARKED: inference_pb.TIER_PARKED,
    Tier.LOCAL: inference_pb.TIER_LOCAL,
    Tier.REMOTE: inference_pb.TIER_REMOTE,
    Tier.COLD: inference_pb.TIER_COLD,
}
_NODE_STATES = node_instances_pb.Instance.State
REPORTED: Final = {
    _NODE_STATES.STATE_STARTING: InstanceState.STARTING,
    _NODE_STATES.STATE_RESTORING: InstanceState.STARTING,
    _NODE_STATES.STATE_SERVING: InstanceState.SERVING,
    _NODE_STATES.STATE_CAPTURING: InstanceState.CAPTURING,
    _NODE_STATES.STATE_PARKING: InstanceState.PARKING,
    _NODE_STATES.STATE_PARKED: InstanceState.PARKED,
    _NODE_STATES.STATE_RESUMING: InstanceState.RESUMING,
    _NODE_STATES.STATE_STOPPING: InstanceState.STOPPING,
    _NODE_STATES.STATE_FAILED: InstanceState.FAILED,
}


def last_segment(name: str) -> str:
    """``deployments/qa`` is ``qa``; so is ``qa``."""
    return name.rpartition("/")[2]


def full_name(collection: str, identifier: str) -> str:
    """A resource's name; empty for an empty id."""
    return f"{collection}/{identifier}" if identifier else ""


def timestamp(seconds: float) -> Timestamp:
    """A wall time as a message."""
    made = Timestamp()
    made.FromMicroseconds(round(seconds * 1e6))
    return made


def duration(seconds: float) -> Duration:
    """Seconds as a message."""
    made = Duration()
    made.FromMicroseconds(round(seconds * 1e6))
    return made


def seconds(message: Timestamp | Duration) -> float:
    """Seconds of a duration, or a wall time."""
    return message.seconds + message.nanos / 1e9


def _phases(phases: Iterable[node_instances_pb.Phase]) -> tuple[Phase, ...]:
    return tuple(Phase(phase.name, seconds(phase.duration)) for phase in phases)


# Requests


def draft(message: deployments_pb.Deployment) -> Draft:
    """The settable fields of a deployment, each checked.

    Raises:
        InvalidArgument: a field is wrong.
    """
    if not message.model.strip():
        raise InvalidArgument(
            "MODEL_REQUIRED", "give a Hugging Face id or a directory on the nodes", field="deployment.model"
        )
    _check_text(message.model, "deployment.model")
    _check_text(message.engine, "deployment.engine")
    options = from_struct(message.engine_options)
    checkpoint = message.checkpoint
    return Draft(
        model=message.model,
        engine=message.engine,
        start_mode=_start_mode(message.start_mode),
        checkpoint_enabled=checkpoint.enabled if checkpoint.HasField("enabled") else None,
        checkpoint_ttl=optional_duration(checkpoint, "ttl", "deployment.checkpoint.ttl"),
        checkpoint_storage=_storage(checkpoint),
        checkpoint_weights=_weights(checkpoint),
        idle_timeout=optional_duration(message, "idle_timeout", "deployment.idle_timeout"),
        park_timeout=optional_duration(message, "park_timeout", "deployment.park_timeout"),
        priority=_priority(message.priority),
        min_instances=_count(message, "min_instances", 0),
        max_instances=_count(message, "max_instances", 1),
        engine_options=engines.check_options(message.engine, options, field="deployment.engine_options"),
    )


def request_id(value: str) -> str:
    """A UUID or nothing, in one spelling. Raises: InvalidArgument."""
    if not value:
        return ""
    try:
        return str(uuid.UUID(value))
    except ValueError as error:
        raise InvalidArgument(
            "INVALID_REQUEST_ID",
            "request_id must be a UUID",
            field="request_id",
            metadata={"value": value[:80]},
        ) from error


def paths(message: deployments_pb.UpdateDeploymentRequest) -> frozenset[str]:
    """The paths that an update changes: its mask, every field for "*", and every field set for no mask."""
    if message.update_mask.paths:
        mask = frozenset(message.update_mask.paths)
        return EVERYTHING if mask == {"*"} else mask
    found = {field.name for field, _ in message.deployment.ListFields()} - {"checkpoint"}
    return frozenset(found | {f"checkpoint.{f.name}" for f, _ in message.deployment.checkpoint.ListFields()})


def overlay(
    old: Deployment, new: deployments_pb.Deployment, changed: frozenset[str]
) -> deployments_pb.Deployment:
    """``new`` with the required fields that ``changed`` leaves out filled in from ``old``."""
    merged = deployments_pb.Deployment()
    merged.CopyFrom(new)
    if "model" not in changed or not merged.model:
        merged.model = old.model
    if "engine" not in changed or not merged.engine:
        merged.engine = old.engine
    if "engine_options" not in changed:
        merged.ClearField("engine_options")
        merged.engine_options.update(dict(old.engine_options))
    if "start_mode" not in changed:
        merged.start_mode = MODES_BACK[old.start_mode]
    return merged


def _check_text(value: str, field: str) -> None:
    if len(value) > MODEL_LIMIT or not value.isprintable():
        raise InvalidArgument(
            "INVALID_TEXT", f"{field} must be at most {MODEL_LIMIT} printable characters", field=field
        )


def _start_mode(value: deployments_pb.StartMode.ValueType) -> StartMode:
    if value in MODES:
        return MODES[value]
    raise InvalidArgument(
        "START_MODE_REQUIRED",
        "deployment.start_mode must be START_MODE_COLD, START_MODE_WARM or START_MODE_CHECKPOINT",
        field="deployment.start_mode",
        metadata={"value": str(value)},
    )


def _storage(checkpoint: deployments_pb.CheckpointSettings) -> Storage:
    if checkpoint.storage in STORAGES:
        return STORAGES[checkpoint.storage]
    field = "deployment.checkpoint.storage"
    raise InvalidArgument("INVALID_STORAGE", f"{field} must be STORAGE_LOCAL or STORAGE_S3", field=field)


def _weights(checkpoint: deployments_pb.CheckpointSettings) -> Weights:
    if checkpoint.weights in WEIGHTS:
        return WEIGHTS[checkpoint.weights]
    field = "deployment.checkpoint.weights"
    raise InvalidArgument(
        "INVALID_WEIGHTS", f"{field} must be WEIGHTS_DETACHED or WEIGHTS_INCLUDED", field=field
    )


def _priority(value: int) -> int:
    if abs(value) > HIGHEST_PRIORITY:
        raise InvalidArgument(
            "INVALID_PRIORITY",
            f"deployment.priority must be from -{HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}; got {value}",
            field="deployment.priority",
            metadata={"value": str(value)},
        )
    return value


def _count(message: Message, name: str, least: int) -> int | None:
    if not message.HasField(name):
        return None
    value: int = getattr(message, name)
    if not least <= value <= MOST_INSTANCES:
        field = f"deployment.{name}"
        raise InvalidArgument(
            "INVALID_INSTANCES",
            f"{field} must be from {least} to {MOST_INSTANCES}; got {value}",
            field=field,
            metadata={"value": str(value)},
        )
    return value


def optional_duration(message: Message, name: str, field: str) -> float | None:
    """The seconds of a duration field; None: it is unset. Raises: InvalidArgument."""
    if not message.HasField(name):
        return None
    value: Duration = getattr(message, name)
    if value.seconds < 0 or value.nanos < 0:
        raise InvalidArgument(
            "NEGATIVE_DURATION",
            f"{field} must not be negative; got {seconds(value):g} s",
            field=field,
            metadata={"seconds": f"{seconds(value):g}"},
        )
    if value.seconds > TEN_YEARS or value.nanos >= 1_000_000_000:
        raise InvalidArgument(
            "DURATION_TOO_LONG",
            f"{field} must be at most ten years; got {value.seconds} s",
            field=field,
            metadata={"seconds": str(value.seconds)},
        )
    return seconds(value)


# Deployments


def deployment_message(
    facts: Deployment, state: DeploymentState, state_message: str, last_use: float | None
) -> deployments_pb.Deployment:
    """A deployment for callers."""
    message = deployments_pb.Deployment(
        name=f"deployments/{facts.id}",
        uid=facts.uid,
        model=facts.model,
        engine=facts.engine,
        start_mode=MODES_BACK[facts.start_mode],
        checkpoint=deployments_pb.CheckpointSettings(
            enabled=facts.checkpoint.enabled,
            ttl=duration(facts.ttl_seconds),
            storage=STORAGES_BACK[facts.checkpoint.storage],
            weights=WEIGHTS_BACK[facts.checkpoint.weights],
        ),
        idle_timeout=duration(facts.idle_seconds),
        park_timeout=duration(facts.park_seconds),
        state=deployments_pb.Deployment.State.Value(f"STATE_{state.name}"),
        state_message=state_message,
        create_time=timestamp(facts.create_time),
        update_time=timestamp(facts.update_time),
        etag=facts.etag,
        priority=facts.priority,
        min_instances=facts.kept_instances,
        max_instances=facts.most_instances,
        engine_options=to_struct(facts.engine_options),
    )
    if last_use is not None:
        message.last_use_time.CopyFrom(timestamp(last_use))
    return message


def candidate_message(candidate: Candidate) -> deployments_pb.StartCandidate:
    """A possible start for callers."""
    found = candidate.room
    return deployments_pb.StartCandidate(
        tier=TIERS[candidate.tier],
        node=f"nodes/{candidate.node}",
        gpu=found.gpu if isinstance(found, Room) else "",
        instance=full_name("instances", candidate.instance),
        snapshot=full_name("snapshots", candidate.snapshot),
        start_duration=duration(candidate.start.seconds),
        room_duration=duration(found.seconds if isinstance(found, Room) else 0.0),
        basis=candidate.start.basis,
        yields=[one.reason for one in found.yields] if isinstance(found, Room) else [],
        why_not=found.reason if isinstance(found, NoRoom) else "",
    )


# Instances


def report(message: node_instances_pb.Instance) -> Report:
    """What snapshotd reports of an instance. A state that this version does not know counts as starting."""
    return Report(
        id=last_segment(message.name),
        deployment=last_segment(message.deployment),
        state=REPORTED.get(message.state, InstanceState.STARTING),
        snapshot=last_segment(message.snapshot),
        pid=message.pid,
        device=message.device,
        memory_bytes=message.memory_bytes,
        create_time=seconds(message.create_time),
        phases=_phases(message.phases),
        failure_reason=message.failure_reason,
        failure_message=message.failure_message,
        weights=node_weights(message.weights),
        model=message.model,
        engine=message.engine,
        engine_options=from_struct(message.engine_options),
        capacity=_capacity(message.capacity) if message.HasField("capacity") else None,
        load=Load(message.load.running, message.load.waiting, message.load.kv_tokens_used),
        gpu=message.gpu,
        gpu_bytes=message.gpu_bytes,
        ram_bytes=message.ram_bytes,
    )


def _capacity(message: inference_words.Capacity) -> Capacity | None:
    """The capacity that a node reports; None if it is not a valid one."""
    kv_tokens = message.kv_tokens if message.HasField("kv_tokens") else None
    if message.sequences <= 0:
        return None
    return Capacity(message.sequences, kv_tokens, message.unbatched_reason)


def node_weights(value: node_instances_pb.Weights.ValueType) -> Weights:
    """Where a node reports that weights are; a node that does not say has them detached."""
    return Weights.INCLUDED if value == node_instances_pb.WEIGHTS_INCLUDED else Weights.DETACHED


def instance_message(
    facts: Instance, last_use: float | None, orphan: bool = False, reasons: Iterable[str] = ()
) -> instances_pb.Instance:
    """An instance for callers."""
    report = facts.report
    message = instances_pb.Instance(
        name=f"instances/{facts.id}",
        deployment=full_name("deployments", facts.deployment),
        node=f"nodes/{facts.node}",
        state=instances_pb.Instance.State.Value(f"STATE_{facts.state.name}"),
        pid=report.pid,
        device=report.device,
        memory_bytes=report.memory_bytes,
        snapshot=full_name("snapshots", report.snapshot),
        create_time=timestamp(report.create_time),
        phases=[
            instances_pb.InstancePhase(name=phase.name, duration=duration(phase.seconds))
            for phase in report.phases
        ],
        failure_reason=report.failure_reason,
        failure_message=report.failure_message,
        orphan=orphan,
        load=inference_words.Load(
            running=report.load.running,
            waiting=report.load.waiting,
            kv_tokens_used=report.load.kv_tokens_used,
        ),
        in_flight=facts.in_flight,
        gpu=report.gpu,
        gpu_bytes=report.gpu_bytes,
        ram_bytes=report.ram_bytes,
        reasons=reasons,
        draining=facts.draining,
    )
    if report.capacity is not None:
        message.capacity.sequences = report.capacity.sequences
        message.capacity.unbatched_reason = report.capacity.unbatched_reason
        if report.capacity.kv_tokens is not None:
            message.capacity.kv_tokens = report.capacity.kv_tokens
    if last_use is not None:
        message.last_use_time.CopyFrom(timestamp(last_use))
    return message


# Snapshots


def snapshot(node: str, message: node_snapshots_pb.Snapshot) -> Snapshot:
    """A snapshot as its node reports it. One in a state that this version does not know is not used."""
    return Snapshot(
        id=last_segment(message.name),
        deployment=last_segment(message.deployment),
        node=node,
        model=message.model,
        quarantined=message.state != node_snapshots_pb.Snapshot.State.STATE_ACTIVE,
        quarantine_reason=message.quarantine_reason,
        create_time=seconds(message.create_time),
        size_bytes=message.size_bytes,
        source_pause_seconds=seconds(message.source_pause_duration),
        compatibility=dict(message.compatibility),
        files=tuple(SnapshotFile(file.name, file.size_bytes, file.digest) for file in message.files),
        manifest_digest=message.manifest_digest,
        weights=node_weights(message.weights),
        local=message.local,
        published=message.published,
        incompatibility=message.incompatibility,
        engine=message.engine,
        engine_options=from_struct(message.engine_options),
        stored=_stored_snapshot(message.stored) if message.HasField("stored") else None,
        device=message.device,
        gpu_bytes=message.gpu_bytes,
    )


def _stored_snapshot(message: node_snapshots_pb.StoredSnapshot) -> StoredSnapshot:
    return StoredSnapshot(
        message.image_bytes,
        message.data_bytes,
        message.stored_bytes,
        message.unique_bytes,
        message.chunk_count,
        message.encrypted,
        message.signer,
    )


def snapshot_message(facts: Snapshot, last_use: float | None, ttl: float | None) -> snapshots_pb.Snapshot:
    """A snapshot for callers; ``ttl`` in seconds, both times None when its deployment is not known."""
    states = snapshots_pb.Snapshot.State
    message = snapshots_pb.Snapshot(
        name=f"snapshots/{facts.id}",
        deployment=full_name("deployments", facts.deployment),
        node=f"nodes/{facts.node}",
        model=facts.model,
        state=states.STATE_QUARANTINED if facts.quarantined else states.STATE_ACTIVE,
        create_time=timestamp(facts.create_time),
        size_bytes=facts.size_bytes,
        source_pause_duration=duration(facts.source_pause_seconds),
        compatibility=dict(facts.compatibility),
        files=[
            snapshots_pb.SnapshotFile(name=file.name, size_bytes=file.size_bytes, digest=file.digest)
            for file in facts.files
        ],
        manifest_digest=facts.manifest_digest,
        quarantine_reason=facts.quarantine_reason,
        local=facts.local,
        published=facts.published,
        orphan=facts.orphan,
    )
    if (stored := facts.stored) is not None:
        message.stored.CopyFrom(
            snapshots_pb.StoredSnapshot(
                image_bytes=stored.image_bytes,
                data_bytes=stored.data_bytes,
                stored_bytes=stored.stored_bytes,
                unique_bytes=stored.unique_bytes,
                chunk_count=stored.chunk_count,
                encrypted=stored.encrypted,
                signer=stored.signer,
            )
        )
    if last_use is not None:
        message.last_use_time.CopyFrom(timestamp(last_use))
    if ttl is not None:
        used = max(facts.create_time, facts.adopt_time, last_use or 0.0)
        if facts.quarantined:
            used = facts.create_time
        elif facts.unusable_since is not None:
            used = facts.unusable_since
        message.expire_time.CopyFrom(timestamp(used + ttl))
    return message


# Nodes


def node(identifier: str, message: nodes_pb.Node) -> Node:
    """Raises: InvalidArgument, ``node.endpoint`` is no address."""
    endpoint = message.endpoint
    if not endpoint.startswith("unix:") and not endpoint.rpartition(":")[2].isdecimal():
        raise InvalidArgument(
            "INVALID_ENDPOINT",
            f"node.endpoint must be host:port or unix:path; got {endpoint[:120]!r}",
            field="node.endpoint",
            metadata={"value": endpoint[:120]},
        )
    return Node(
        id=identifier,
        endpoint=endpoint,
        version=message.version,
        gpu_models=tuple(message.gpu_models),
        memory_total_bytes=message.memory_total_bytes,
        memory_available_bytes=message.memory_available_bytes,
        cpu_count=message.cpu_count,
        checkpoint_capable=message.checkpoint_capable,
        findings=tuple(Finding(f.check, f.passed, f.message) for f in message.findings),
        object_store=message.object_store,
        snapshot_limit_bytes=max(0, message.snapshot_limit_bytes),
        gpus=gpus(message.gpus),
        instance_memory_limit_bytes=max(0, message.instance_memory_limit_bytes),
        parked_memory_limit_bytes=max(0, message.parked_memory_limit_bytes),
        weight_cache_limit_bytes=max(0, message.weight_cache_limit_bytes),
        weight_cache_bytes=max(0, message.weight_cache_bytes),
        disk_free_bytes=max(0, message.disk_free_bytes),
        engines=dict(message.engines),
    )


def gpus(messages: Iterable[nodes_pb.NodeGpu]) -> tuple[Gpu, ...]:
    """The GPUs of a node."""
    return tuple(
        Gpu(gpu.uuid, gpu.model, gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.memory_other_bytes)
        for gpu in messages
    )


def node_message(
    facts: Node, snapshot_bytes: int = 0, instance_memory_bytes: int = 0, parked_memory_bytes: int = 0
) -> nodes_pb.Node:
    """A node for callers."""
    # A node that is still being asked what it holds cannot be used either.
    ready = facts.state is NodeState.READY
    states = nodes_pb.Node.State
    return nodes_pb.Node(
        name=f"nodes/{facts.id}",
        endpoint=facts.endpoint,
        state=states.STATE_READY if ready else states.STATE_UNREACHABLE,
        version=facts.version,
        gpu_models=facts.gpu_models,
        memory_total_bytes=facts.memory_total_bytes,
        memory_available_bytes=facts.memory_available_bytes,
        cpu_count=facts.cpu_count,
        checkpoint_capable=facts.checkpoint_capable,
        heartbeat_time=timestamp(facts.heartbeat_time),
        findings=[
            nodes_pb.NodeFinding(check=f.check, passed=f.passed, message=f.message) for f in facts.findings
        ],
        object_store=facts.object_store,
        snapshot_limit_bytes=facts.snapshot_limit_bytes,
        engines=facts.engines,
        snapshot_bytes=snapshot_bytes,
        draining=facts.draining,
        gpus=[
            nodes_pb.NodeGpu(
                uuid=gpu.uuid,
                model=gpu.model,
                memory_total_bytes=gpu.total_bytes,
                memory_free_bytes=gpu.free_bytes,
                memory_other_bytes=gpu.other_bytes,
            )
            for gpu in facts.gpus
        ],
        instance_memory_limit_bytes=facts.instance_memory_limit_bytes,
        instance_memory_bytes=instance_memory_bytes,
        parked_memory_limit_bytes=facts.parked_memory_limit_bytes,
        parked_memory_bytes=parked_memory_bytes,
        weight_cache_limit_bytes=facts.weight_cache_limit_bytes,
        weight_cache_bytes=facts.weight_cache_bytes,
        disk_free_bytes=facts.disk_free_bytes,
    )


def drained_message(node: str, left: Iterable[Remainder]) -> nodes_pb.DrainNodeResponse:
    """What is left on a node that was drained, for callers."""
    return nodes_pb.DrainNodeResponse(
        node=f"nodes/{node}",
        left=[
            nodes_pb.NodeRemainder(
                instance=f"instances/{one.instance}",
                deployment=full_name("deployments", one.deployment),
                reason=one.reason,
                message=one.message,
            )
            for one in left
        ],
    )


# Starts


def start_info_message(info: StartInfo) -> inference_pb.StartInfo:
    """How a start went, for callers."""
    return inference_pb.StartInfo(
        tier=TIERS[info.tier],
        reasons=info.reasons,
        phases=[
            inference_pb.StartPhase(name=phase.name, duration=duration(phase.seconds))
            for phase in info.phases
        ],
        total_duration=duration(info.total_seconds),
        instance=f"instances/{info.instance}",
        node=f"nodes/{info.node}",
    )

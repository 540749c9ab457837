"""Convert facts to protobuf messages. Only this module knows both."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dumont import names
from dumont.errors import InvalidArgument
from dumont.inference.v1 import inference_pb2
from dumont.rpc.structs import to_struct
from dumont.snapshotd.v1 import instance_service_pb2 as instances_pb2
from dumont.snapshotd.v1 import node_service_pb2 as nodes_pb2
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from snapshotd.model import Engine, Finding, Instance, Model, Phase, Snapshot, State, Unservable, Weights
from snapshotd.repository.model import PrunePlan, PublishedSnapshot, Usage
from snapshotd.snapshots.catalog import RejectedSnapshot
from snapshotd.system import linux

STATES = {
    State.STARTING: instances_pb2.Instance.STATE_STARTING,
    State.RESTORING: instances_pb2.Instance.STATE_RESTORING,
    State.SERVING: instances_pb2.Instance.STATE_SERVING,
    State.CAPTURING: instances_pb2.Instance.STATE_CAPTURING,
    State.PARKING: instances_pb2.Instance.STATE_PARKING,
    State.PARKED: instances_pb2.Instance.STATE_PARKED,
    State.RESUMING: instances_pb2.Instance.STATE_RESUMING,
    State.STOPPING: instances_pb2.Instance.STATE_STOPPING,
    State.FAILED: instances_pb2.Instance.STATE_FAILED,
}
WEIGHTS = {
    Weights.DETACHED: instances_pb2.WEIGHTS_DETACHED,
    Weights.INCLUDED: instances_pb2.WEIGHTS_INCLUDED,
}
PAGE_BYTES = 4096
# A prune names at most this many objects, and counts all.
MOST_NAMED = 1000


def instance(fact: Instance) -> instances_pb2.Instance:
    """An instance as its message."""
    return instances_pb2.Instance(
        name=names.build("instances", fact.id),
        deployment=fact.deployment,
        model=fact.model,
        engine=fact.engine,
        state=STATES[fact.state],
        pid=fact.pid if fact.state is not State.FAILED else 0,
        snapshot=names.build("snapshots", fact.snapshot) if fact.snapshot else "",
        create_time=timestamp(fact.create_time),
        phases=phases(fact.phases),
        failure_reason=fact.failure_reason,
        failure_message=fact.failure_message,
        memory_bytes=resident_bytes(fact.pid) if fact.state is not State.FAILED else 0,
        device=fact.device,
        gpu=fact.gpu,
        gpu_bytes=fact.gpu_bytes,
        ram_bytes=linux.own_memory(fact.pid) if fact.state is not State.FAILED else 0,
        weights=WEIGHTS[fact.weights],
        engine_options=to_struct(fact.engine_options),
        capacity=None
        if fact.capacity is None
        else inference_pb2.Capacity(
            sequences=fact.capacity.sequences,
            kv_tokens=fact.capacity.kv_tokens,
            unbatched_reason=fact.capacity.unbatched_reason,
        ),
        load=inference_pb2.Load(
            running=fact.load.running,
            waiting=fact.load.waiting,
            kv_tokens_used=fact.load.kv_tokens_used,
        ),
    )


def snapshot(fact: Snapshot, incompatibility: str = "") -> snapshots_pb2.Snapshot:
    """A snapshot as its message.

    Args:
        incompatibility: why this node cannot restore it; empty if it can.
    """
    manifest = fact.manifest
    state = (
        snapshots_pb2.Snapshot.STATE_QUARANTINED
        if fact.quarantine_reason
        else snapshots_pb2.Snapshot.STATE_ACTIVE
    )
    return snapshots_pb2.Snapshot(
        name=names.build("snapshots", manifest.id),
        deployment=manifest.deployment,
        model=manifest.model,
        engine=manifest.engine,
        state=state,
        create_time=timestamp(manifest.create_time),
        size_bytes=fact.size,
        source_pause_duration=duration(manifest.source_pause_seconds),
        phases=phases(manifest.phases),
        compatibility=manifest.compatibility,
        files=[
            snapshots_pb2.SnapshotFile(name=file.name, size_bytes=file.size, digest=file.digest)
            for file in manifest.files
        ],
        manifest_digest=fact.digest,
        quarantine_reason=fact.quarantine_reason,
        local=fact.local,
        published=fact.published,
        incompatibility=incompatibility,
        weights=WEIGHTS[manifest.weights],
        device=manifest.device,
        gpu_bytes=manifest.gpu_bytes,
        engine_options=to_struct(manifest.engine_options),
    )


def weights(value: instances_pb2.Weights.ValueType) -> Weights:
    """Where a request wants the weights to be.

    Raises:
        InvalidArgument: INVALID_WEIGHTS.
    """
    if value == instances_pb2.WEIGHTS_UNSPECIFIED:
        return Weights.DETACHED
    for known, message in WEIGHTS.items():
        if message == value:
            return known
    raise InvalidArgument(
        "INVALID_WEIGHTS", "weights must be WEIGHTS_DETACHED or WEIGHTS_INCLUDED", field="weights"
    )


def rejected(fact: RejectedSnapshot) -> snapshots_pb2.Snapshot:
    """A rejected snapshot, of which nothing is known but its name and the reason."""
    return snapshots_pb2.Snapshot(
        name=names.build("snapshots", fact.snapshot),
        state=snapshots_pb2.Snapshot.STATE_QUARANTINED,
        quarantine_reason=fact.reason,
        local=fact.local,
        published=not fact.local,
    )


def stored(published: PublishedSnapshot, usage: Usage) -> snapshots_pb2.StoredSnapshot:
    """The size of a published snapshot as its message."""
    return snapshots_pb2.StoredSnapshot(
        image_bytes=usage.image_bytes,
        data_bytes=usage.data_bytes,
        stored_bytes=usage.stored_bytes,
        unique_bytes=usage.unique_bytes,
        chunk_count=usage.chunks,
        encrypted=published.encrypted,
        signer=published.signer,
    )


def prune(plan: PrunePlan) -> snapshots_pb2.PruneSnapshotsResponse:
    """The plan of a prune as the response to its request."""
    doomed = [*plan.garbage, *plan.tombstones]
    return snapshots_pb2.PruneSnapshotsResponse(
        objects=[item.key for item in doomed[:MOST_NAMED]],
        object_count=len(doomed),
        size_bytes=sum(item.size for item in doomed),
        kept_bytes=plan.kept_bytes,
    )


def model(fact: Model) -> nodes_pb2.Model:
    """A model as its message."""
    return nodes_pb2.Model(
        model=fact.name,
        engine=fact.engine,
        weights_size_bytes=fact.weights_bytes,
        cached=fact.directory is not None,
        context_length=fact.context_length,
    )


def held_model(fact: Model | Unservable) -> nodes_pb2.Model:
    """A model that the node has as its message."""
    if isinstance(fact, Unservable):
        return nodes_pb2.Model(model=fact.name, cached=True, problem=fact.problem)
    return model(fact)


def engines(facts: Iterable[Engine]) -> list[nodes_pb2.Engine]:
    """Engines under interpreters of their own as messages."""
    return [nodes_pb2.Engine(name=fact.name, version=fact.version, python=str(fact.python)) for fact in facts]


def findings(facts: Iterable[Finding]) -> list[nodes_pb2.Finding]:
    """Findings of the preflight as messages."""
    return [nodes_pb2.Finding(check=fact.check, passed=fact.passed, message=fact.message) for fact in facts]


def phases(facts: Iterable[Phase]) -> list[instances_pb2.Phase]:
    """Phases as messages."""
    return [instances_pb2.Phase(name=fact.name, duration=duration(fact.seconds)) for fact in facts]


def duration(seconds: float) -> Duration:
    """Seconds as a message."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def timestamp(time: datetime) -> Timestamp:
    """A time as a message."""
    message = Timestamp()
    message.FromDatetime(time)
    return message


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, in bytes; 0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES if pid else 0
    except (OSError, IndexError):
        return 0

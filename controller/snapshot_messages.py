"""Snapshots: protocol messages to facts and back."""

from __future__ import annotations

from controller import convert
from controller.model import Snapshot, SnapshotFile, StoredSnapshot
from dumont.controller.v1 import snapshot_service_pb2 as snapshots_pb
from dumont.snapshotd.v1 import snapshot_service_pb2 as node_snapshots_pb


def fact(node: str, message: node_snapshots_pb.Snapshot) -> Snapshot:
    """A snapshot as its node describes it; one in a state this version does not know is not used."""
    return Snapshot(
        id=convert.last_segment(message.name),
        deployment=convert.last_segment(message.deployment),
        node=node,
        model=message.model,
        quarantined=message.state != node_snapshots_pb.Snapshot.State.STATE_ACTIVE,
        quarantine_reason=message.quarantine_reason,
        create_time=convert.seconds(message.create_time),
        size_bytes=message.size_bytes,
        source_pause_seconds=convert.seconds(message.source_pause_duration),
        compatibility=dict(message.compatibility),
        files=tuple(SnapshotFile(file.name, file.size_bytes, file.digest) for file in message.files),
        manifest_digest=message.manifest_digest,
        weights=convert.node_weights(message.weights),
        local=message.local,
        published=message.published,
        incompatibility=message.incompatibility,
        engine=message.engine,
        stored=_stored(message.stored) if message.HasField("stored") else None,
    )


def _stored(message: node_snapshots_pb.StoredSnapshot) -> StoredSnapshot:
    return StoredSnapshot(
        message.image_bytes,
        message.data_bytes,
        message.stored_bytes,
        message.unique_bytes,
        message.chunk_count,
        message.encrypted,
        message.signer,
    )


def message(facts: Snapshot, last_use: float | None, ttl: float | None) -> snapshots_pb.Snapshot:
    """For callers; ``last_use`` is the deployment's, ``ttl`` in seconds, None when there is no deployment."""
    states = snapshots_pb.Snapshot.State
    made = snapshots_pb.Snapshot(
        name=f"snapshots/{facts.id}",
        deployment=convert.full_name("deployments", facts.deployment),
        node=f"nodes/{facts.node}",
        model=facts.model,
        state=states.STATE_QUARANTINED if facts.quarantined else states.STATE_ACTIVE,
        create_time=convert.timestamp(facts.create_time),
        size_bytes=facts.size_bytes,
        source_pause_duration=convert.duration(facts.source_pause_seconds),
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
        made.stored.CopyFrom(
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
        made.last_use_time.CopyFrom(convert.timestamp(last_use))
    if ttl is not None:
        used = max(facts.create_time, facts.adopt_time, last_use or 0.0)
        if facts.quarantined:
            used = facts.create_time
        elif facts.unusable_since is not None:
            used = facts.unusable_since
        made.expire_time.CopyFrom(convert.timestamp(used + ttl))
    return made

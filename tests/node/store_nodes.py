"""Nodes that share an object store, one after the other, and what is done to them in tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from dumont.errors import DumontError
from dumont.rpc.status import from_rpc_error
from dumont.snapshotd.v1 import instance_service_pb2 as instances_pb2
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from tests.node.daemon import Daemon

Snapshot = snapshots_pb2.Snapshot


@dataclass
class StoreNodes:
    """Nodes with state directories of their own below ``root`` and one store.

    ``answer`` and ``digest`` are what the captured source said, and the digest of its snapshot's manifest.
    """

    root: Path
    port: Callable[[], int]
    store: str
    answer: str = ""
    digest: str = ""

    @property
    def trusted(self) -> Path:
        return self.root / "trusted"

    def node(self, name: str, *flags: str, store: str = "") -> Daemon:
        """A node that trusts every node passed to ``trust`` before it starts."""
        self.trusted.touch()
        return Daemon(
            self.root / name, self.port(), "--store-url", store or self.store,
            "--trusted-keys-file", str(self.trusted), "--stop-instances-on-exit", *flags,
        )  # fmt: skip

    def trust(self, name: str) -> None:
        with self.trusted.open("a") as file:
            file.write((self.root / name / "signing.pub").read_text())

    def fill(self, daemon: Daemon, model: Path) -> None:
        """Have a running node capture ``one``, and remember what its source said."""
        daemon.start_instance("source", model)
        self.digest = capture(daemon).manifest_digest
        self.answer = daemon.generate("source")
        self.trust(daemon.state_dir.name)

    def copy_snapshots(self, source: str, target: str) -> None:
        """Give a node that was never started the snapshots and the signing key of another."""
        folder = self.root / target
        folder.mkdir(mode=0o700)
        shutil.copytree(self.root / source / "snapshots", folder / "snapshots", copy_function=os.link)
        shutil.copy2(self.root / source / "signing.key", folder / "signing.key")
        # So that the model's files are not read again: they are the same.
        shutil.copy2(self.root / source / "weights.json", folder / "weights.json")


def capture(daemon: Daemon, instance: str = "source", snapshot: str = "one") -> Snapshot:
    request = instances_pb2.CaptureInstanceRequest(name=f"instances/{instance}", snapshot_id=snapshot)
    answer = Snapshot()
    daemon.wait(daemon.instances.CaptureInstance(request), answer)
    return answer


def publish(daemon: Daemon, snapshot: str = "one") -> Snapshot:
    answer = Snapshot()
    request = snapshots_pb2.PublishSnapshotRequest(name=f"snapshots/{snapshot}")
    daemon.wait(daemon.snapshots.PublishSnapshot(request), answer)
    return answer


def prefetch(daemon: Daemon, snapshot: str = "one", digest: str = "") -> Snapshot:
    answer = Snapshot()
    request = snapshots_pb2.PrefetchSnapshotRequest(name=f"snapshots/{snapshot}", manifest_digest=digest)
    try:
        daemon.wait(daemon.snapshots.PrefetchSnapshot(request), answer)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    return answer


def restore(daemon: Daemon, instance: str, snapshot: str = "one", digest: str = "") -> instances_pb2.Instance:
    request = instances_pb2.RestoreInstanceRequest(
        instance_id=instance, snapshot=f"snapshots/{snapshot}", manifest_digest=digest
    )
    answer = instances_pb2.Instance()
    try:
        daemon.wait(daemon.instances.RestoreInstance(request), answer)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    return answer


def refused(daemon: Daemon, instance: str, snapshot: str = "one", digest: str = "") -> DumontError:
    """The error that a restore ends with; the instance it left is removed."""
    try:
        restore(daemon, instance, snapshot, digest)
    except DumontError as error:
        if instance in instances(daemon):
            assert daemon.get(instance).state == instances_pb2.Instance.STATE_FAILED
            daemon.stop_instance(instance)
        return error
    raise AssertionError(f"snapshots/{snapshot} was restored")


def instances(daemon: Daemon) -> list[str]:
    answer = daemon.instances.ListInstances(instances_pb2.ListInstancesRequest())
    return [instance.name.removeprefix("instances/") for instance in answer.instances]


def listed(daemon: Daemon) -> dict[str, Snapshot]:
    answer = daemon.snapshots.ListSnapshots(snapshots_pb2.ListSnapshotsRequest())
    return {snapshot.name.removeprefix("snapshots/"): snapshot for snapshot in answer.snapshots}


def delete(daemon: Daemon, snapshot: str = "one") -> None:
    daemon.snapshots.DeleteSnapshot(snapshots_pb2.DeleteSnapshotRequest(name=f"snapshots/{snapshot}"))


def prune(daemon: Daemon, dry_run: bool = False) -> snapshots_pb2.PruneSnapshotsResponse:
    answer = snapshots_pb2.PruneSnapshotsResponse()
    request = snapshots_pb2.PruneSnapshotsRequest(dry_run=dry_run)
    daemon.wait(daemon.snapshots.PruneSnapshots(request), answer)
    return answer


def verify(daemon: Daemon, snapshot: str = "one") -> snapshots_pb2.VerifySnapshotResponse:
    answer = snapshots_pb2.VerifySnapshotResponse()
    request = snapshots_pb2.VerifySnapshotRequest(name=f"snapshots/{snapshot}")
    daemon.wait(daemon.snapshots.VerifySnapshot(request), answer)
    return answer

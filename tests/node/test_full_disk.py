"""A node whose disk is full goes on serving, leaves nothing half done, and recovers by itself."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.longrunning import operations_pb2

from dumont.errors import DumontError, ResourceExhausted
from dumont.snapshotd.v1 import instance_service_pb2 as pb2
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from tests.node.daemon import Daemon

pytestmark = pytest.mark.node

# Room for two or three snapshots of the small model.
DISK = 600 << 20
ATTEMPTS = 12


@pytest.fixture(scope="module")
def disk(root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of its own."""
    mounted = tmp_path_factory.mktemp("full")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", mounted], check=True)
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


@pytest.fixture
def daemon(criu: Path, free_port: Callable[[], int], disk: Path) -> Iterator[Daemon]:
    """A snapshotd whose state, snapshots and log lie on it."""
    with Daemon(disk / "state", free_port(), "--stop-instances-on-exit") as running:
        yield running


def capture(daemon: Daemon, instance: str, snapshot: str) -> None:
    request = pb2.CaptureInstanceRequest(name=f"instances/{instance}", snapshot_id=snapshot)
    daemon.wait(daemon.instances.CaptureInstance(request), snapshots_pb2.Snapshot())


def staged(disk: Path) -> list[Path]:
    return list((disk / "state" / "snapshots").glob(".staged-*"))


def fill(disk: Path) -> Path:
    """Take every byte that is left."""
    filler = disk / "filler"
    filler.touch()
    for size in (1 << 20, 4096):
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(size)):
                pass
    assert shutil.disk_usage(disk).free == 0
    return filler


def test_captures_until_the_disk_is_full_leave_the_instance_serving(
    daemon: Daemon, disk: Path, instruct_model: Path
) -> None:
    # Given an instance, and captures until there is no room for another one
    daemon.start_instance("one", instruct_model)
    made, refusals = [], []
    for attempt in range(ATTEMPTS):
        try:
            capture(daemon, "one", f"capture-{attempt}")
            made.append(f"capture-{attempt}")
        except DumontError as error:
            refusals.append(error)

        # Then, each time, it serves on, and nothing of what was not made is left
        assert daemon.get("one").state == pb2.Instance.STATE_SERVING
        assert staged(disk) == []
    assert made
    assert len(refusals) >= ATTEMPTS // 2
    assert {(type(error), error.reason) for error in refusals} == {(ResourceExhausted, "DISK_FULL")}

    # And when not one byte is left, not even for the log, whatever needs none still works
    filler = fill(disk)
    for attempt in range(3):
        with pytest.raises(ResourceExhausted):
            capture(daemon, "one", f"full-{attempt}")
    listed = daemon.operations.ListOperations(operations_pb2.ListOperationsRequest(), timeout=10)
    assert len(listed.operations) >= ATTEMPTS
    assert daemon.get("one").state == pb2.Instance.STATE_SERVING
    assert daemon.generate("one")

    # When there is room again, then the next capture succeeds, without anybody's help
    filler.unlink()
    daemon.snapshots.DeleteSnapshot(snapshots_pb2.DeleteSnapshotRequest(name=f"snapshots/{made[0]}"))
    daemon.start_instance("two", instruct_model)
    capture(daemon, "two", "again")
    daemon.stop_instance("one")
    daemon.stop_instance("two")


def test_a_disk_that_fills_up_during_a_capture_leaves_the_instance_serving(
    daemon: Daemon, disk: Path, instruct_model: Path
) -> None:
    """Somebody else may take the room that was there when the capture began."""
    for snapshot in list(daemon.snapshots.ListSnapshots(snapshots_pb2.ListSnapshotsRequest()).snapshots):
        daemon.snapshots.DeleteSnapshot(snapshots_pb2.DeleteSnapshotRequest(name=snapshot.name))
    daemon.start_instance("three", instruct_model)
    request = pb2.CaptureInstanceRequest(name="instances/three", snapshot_id="raced")

    operation = daemon.instances.CaptureInstance(request)
    while daemon.get("three").state == pb2.Instance.STATE_CAPTURING and not staged(disk):
        pass
    filler = fill(disk)
    with pytest.raises(ResourceExhausted) as refused:
        daemon.wait(operation, snapshots_pb2.Snapshot())
    assert refused.value.reason == "DISK_FULL"
    assert staged(disk) == []
    assert daemon.get("three").state == pb2.Instance.STATE_SERVING
    assert daemon.generate("three")
    filler.unlink()
    daemon.stop_instance("three")

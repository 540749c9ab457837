"""snapshotd as a process on a machine with a GPU, and what lives on when it dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dumont.snapshotd.v1 import instance_service_pb2 as pb2
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from tests.node.daemon import Daemon

pytestmark = [pytest.mark.gpu, pytest.mark.node]


@pytest.fixture(scope="module")
def daemon(
    criu: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    state_dir = tmp_path_factory.mktemp("daemon") / "state"
    with Daemon(state_dir, free_port(), "--stop-instances-on-exit", device="auto") as running:
        yield running


@pytest.fixture(scope="module")
def answer(daemon: Daemon, gpu_model: Path) -> str:
    """What instances of the snapshot ``snapshots/one`` say."""
    started = daemon.start_instance("one", gpu_model)
    assert started.device.startswith("cuda")
    assert started.gpu
    request = pb2.CaptureInstanceRequest(name="instances/one", snapshot_id="one")
    daemon.wait(daemon.instances.CaptureInstance(request), snapshots_pb2.Snapshot())
    said = daemon.generate("one")
    daemon.stop_instance("one")
    return said


def restored(daemon: Daemon) -> pb2.Instance:
    instance = pb2.Instance()
    request = pb2.RestoreInstanceRequest(instance_id="victim", snapshot="snapshots/one")
    daemon.wait(daemon.instances.RestoreInstance(request), instance)
    return instance


@pytest.mark.parametrize(
    "failpoint",
    [
        "park.quiesce.after",
        "park.cuda_checkpoint.after",
        "capture.quiesce.after",
        "capture.cuda_checkpoint.after",
        "capture.dump.after",
        "capture.cuda_restore.after",
    ],
)
def test_a_crash_in_the_middle_of_a_park_or_capture_leaves_the_source_serving(
    daemon: Daemon, answer: str, failpoint: str
) -> None:
    source = restored(daemon)

    def job() -> object:
        if failpoint.startswith("park"):
            return daemon.instances.ParkInstance(pb2.ParkInstanceRequest(name="instances/victim"))
        capture = pb2.CaptureInstanceRequest(name="instances/victim", snapshot_id="half")
        return daemon.wait(daemon.instances.CaptureInstance(capture), snapshots_pb2.Snapshot())

    daemon.crash(failpoint, job)
    daemon.start()

    after = daemon.get("victim")
    assert (after.pid, after.state) == (source.pid, pb2.Instance.STATE_SERVING)
    assert daemon.generate("victim") == answer
    daemon.stop_instance("victim")


def test_a_parked_instance_is_still_parked_after_a_crash_and_resumes(daemon: Daemon, answer: str) -> None:
    source = restored(daemon)
    daemon.instances.ParkInstance(pb2.ParkInstanceRequest(name="instances/victim"))
    daemon.kill()
    daemon.start()
    assert daemon.get("victim").state == pb2.Instance.STATE_PARKED
    resumed = daemon.instances.ResumeInstance(pb2.ResumeInstanceRequest(name="instances/victim"))
    assert (resumed.pid, resumed.gpu) == (source.pid, source.gpu)
    assert daemon.generate("victim") == answer
    daemon.stop_instance("victim")


@pytest.mark.parametrize("failpoint", ["resume.cuda_restore", "resume.cuda_restore.after"])
def test_a_crash_in_the_middle_of_a_resume_leaves_it_serving(
    daemon: Daemon, answer: str, failpoint: str
) -> None:
    source = restored(daemon)
    daemon.instances.ParkInstance(pb2.ParkInstanceRequest(name="instances/victim"))
    resume = pb2.ResumeInstanceRequest(name="instances/victim")
    daemon.crash(failpoint, lambda: daemon.instances.ResumeInstance(resume))
    daemon.start()
    after = daemon.get("victim")
    assert (after.pid, after.state) == (source.pid, pb2.Instance.STATE_SERVING)
    assert daemon.generate("victim") == answer
    daemon.stop_instance("victim")


def test_a_crash_in_the_middle_of_a_restore_leaves_nothing(daemon: Daemon, answer: str) -> None:
    daemon.crash("restore.cuda_restore.after", lambda: restored(daemon))
    daemon.start()
    listed = daemon.instances.ListInstances(pb2.ListInstancesRequest()).instances
    assert [item.name for item in listed] == []
    restored(daemon)
    assert daemon.generate("victim") == answer
    daemon.stop_instance("victim")

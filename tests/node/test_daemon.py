"""snapshotd as a process: what lives on when it dies, and what it refuses."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dumont.errors import DumontError, NotFound
from dumont.rpc.status import from_rpc_error
from dumont.snapshotd.v1 import instance_service_pb2 as pb2
from dumont.snapshotd.v1 import node_service_pb2 as nodes_pb2
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from snapshotd.system.freezer import cgroup2_root
from tests.node.daemon import Daemon

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def daemon(
    criu: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    # A deep path: sockets below it would not fit into an address.
    state_dir = tmp_path_factory.mktemp("daemon") / ("deep-" * 12) / ("deeper-" * 12) / "state"
    state_dir.parent.mkdir(parents=True)
    with Daemon(state_dir, free_port(), "--stop-instances-on-exit") as running:
        yield running


@pytest.fixture(scope="module")
def instance(daemon: Daemon, small_model: Path) -> str:
    """A serving instance, and a snapshot of it; both are called ``one``."""
    daemon.start_instance("one", small_model)
    request = pb2.CaptureInstanceRequest(name="instances/one", snapshot_id="one")
    snapshot = snapshots_pb2.Snapshot()
    daemon.wait(daemon.instances.CaptureInstance(request), snapshot)
    assert snapshot.state == snapshots_pb2.Snapshot.STATE_ACTIVE
    return "one"


def test_a_model_host_that_needs_too_much_memory_is_ended_by_name(
    criu: Path, free_port: Callable[[], int], embedding_model: Path, tmp_path: Path
) -> None:
    # Given a node that gives a model host less than any needs
    flags = ("--host-memory-bytes", str(64 << 20))
    with Daemon(tmp_path / "state", free_port(), *flags) as daemon:
        # When one is started
        with pytest.raises(DumontError) as refused:
            daemon.start_instance("small", embedding_model)

        # Then it alone ends, and says why
        assert refused.value.reason == "HOST_OUT_OF_MEMORY"
        assert f"{64 << 20} bytes" in refused.value.message
        assert daemon.get("small").state == pb2.Instance.STATE_FAILED
        assert daemon.get("small").failure_reason == "HOST_OUT_OF_MEMORY"


def test_models_live_through_a_crash_of_snapshotd_and_are_taken_over(daemon: Daemon, instance: str) -> None:
    # given
    before = daemon.get(instance)
    answer = daemon.generate(instance)

    # when
    daemon.kill()
    os.kill(before.pid, 0)
    daemon.start()

    # then: the same process answers, and its snapshot is still there
    after = daemon.get(instance)
    assert (after.pid, after.state) == (before.pid, pb2.Instance.STATE_SERVING)
    assert after.model == before.model
    assert daemon.generate(instance) == answer
    listed = daemon.snapshots.ListSnapshots(snapshots_pb2.ListSnapshotsRequest())
    assert [snapshot.name for snapshot in listed.snapshots] == ["snapshots/one"]


def test_a_parked_instance_is_still_parked_after_a_crash(daemon: Daemon, instance: str) -> None:
    request = pb2.ParkInstanceRequest(name=f"instances/{instance}")
    assert daemon.instances.ParkInstance(request).state == pb2.Instance.STATE_PARKED
    answer_to_parked = refusal(lambda: daemon.generate(instance))
    assert answer_to_parked.reason == "INSTANCE_NOT_SERVING"

    daemon.kill()
    daemon.start()

    assert daemon.get(instance).state == pb2.Instance.STATE_PARKED
    resumed = daemon.instances.ResumeInstance(pb2.ResumeInstanceRequest(name=f"instances/{instance}"))
    assert resumed.state == pb2.Instance.STATE_SERVING
    assert daemon.generate(instance)


def test_a_parked_instance_ends_whose_shim_was_killed_together_with_the_daemon(
    daemon: Daemon, instance: str
) -> None:
    # given: a frozen process, which cannot notice that nobody holds it any more
    restored = pb2.Instance()
    restore = pb2.RestoreInstanceRequest(instance_id="orphan", snapshot="snapshots/one")
    daemon.wait(daemon.instances.RestoreInstance(restore), restored)
    daemon.instances.ParkInstance(pb2.ParkInstanceRequest(name="instances/orphan"))
    process = os.pidfd_open(restored.pid)

    # when
    daemon.kill()
    os.kill(shim_of(restored.pid), signal.SIGKILL)
    daemon.start()

    # then
    assert select.select([process], [], [], 0)[0], f"process {restored.pid} is still there"
    os.close(process)
    assert isinstance(refusal(lambda: daemon.get("orphan")), NotFound)
    assert daemon.generate(instance)


def test_a_killed_shim_leaves_neither_file_nor_cgroup(daemon: Daemon, instance: str) -> None:
    # given
    restored = pb2.Instance()
    restore = pb2.RestoreInstanceRequest(instance_id="shimless", snapshot="snapshots/one")
    daemon.wait(daemon.instances.RestoreInstance(restore), restored)
    shim = shim_of(restored.pid)
    name = Path(f"/proc/{shim}/cmdline").read_text().partition(".sock")[0].rpartition("/")[2]

    # when
    os.kill(shim, signal.SIGKILL)
    for change in daemon.instances.WatchInstances(pb2.WatchInstancesRequest()):
        if change.instance.name == "instances/shimless" and (
            change.instance.state == pb2.Instance.STATE_FAILED
        ):
            break
    daemon.stop_instance("shimless")

    # then
    assert [path.name for path in (daemon.state_dir / "shims").iterdir() if name in path.name] == []
    groups = cgroup2_root()
    assert groups is None or not (groups / "dumont" / name).exists()


@pytest.mark.parametrize("step", ["prepare", "drain", "quiesce", "dump", "wake", "commit"])
def test_a_crash_in_the_middle_of_a_capture_leaves_the_source_serving(
    daemon: Daemon, instance: str, small_model: Path, step: str
) -> None:
    # given: a source that nobody has asked anything
    source = pb2.Instance()
    request = pb2.RestoreInstanceRequest(instance_id="victim", snapshot="snapshots/one")
    daemon.wait(daemon.instances.RestoreInstance(request), source)

    # when
    capture = pb2.CaptureInstanceRequest(name="instances/victim", snapshot_id="half")
    daemon.crash(
        f"capture.{step}.after",
        lambda: daemon.wait(daemon.instances.CaptureInstance(capture), snapshots_pb2.Snapshot()),
    )
    daemon.start()

    # then: the very process serves, and no half snapshot is listed
    after = daemon.get("victim")
    assert (after.pid, after.state) == (source.pid, pb2.Instance.STATE_SERVING)
    assert daemon.generate("victim")
    listed = [
        item.name for item in daemon.snapshots.ListSnapshots(snapshots_pb2.ListSnapshotsRequest()).snapshots
    ]
    if step == "commit":
        assert "snapshots/half" in listed
        daemon.snapshots.DeleteSnapshot(snapshots_pb2.DeleteSnapshotRequest(name="snapshots/half"))
    else:
        assert "snapshots/half" not in listed
    assert not list((daemon.state_dir / "snapshots").glob(".staged-*"))
    daemon.stop_instance("victim")


@pytest.mark.parametrize("step", ["directory", "criu", "wake", "serve"])
def test_a_crash_in_the_middle_of_a_restore_leaves_nothing(daemon: Daemon, instance: str, step: str) -> None:
    request = pb2.RestoreInstanceRequest(instance_id="half", snapshot="snapshots/one")

    daemon.crash(
        f"restore.{step}.after",
        lambda: daemon.wait(daemon.instances.RestoreInstance(request), pb2.Instance()),
    )
    daemon.start()

    listed = daemon.instances.ListInstances(pb2.ListInstancesRequest()).instances
    assert [item.name for item in listed] == [f"instances/{instance}"]
    assert [path.name for path in (daemon.state_dir / "instances").iterdir()] == [instance]
    assert [path.stem for path in (daemon.state_dir / "journal").glob("*.json")] == [instance]
    # The snapshot is as good as before.
    daemon.wait(daemon.instances.RestoreInstance(request), pb2.Instance())
    assert daemon.generate("half")
    daemon.stop_instance("half")


def test_the_same_start_twice_is_one_start(daemon: Daemon, small_model: Path) -> None:
    request = pb2.StartInstanceRequest(instance_id="twice", model=str(small_model))
    first = daemon.instances.StartInstance(request)
    second = daemon.instances.StartInstance(request)
    assert first.name == second.name
    daemon.wait(first, pb2.Instance())

    other = pb2.StartInstanceRequest(instance_id="twice", model=str(small_model), deployment="other")
    error = refusal(lambda: daemon.instances.StartInstance(other))
    assert (error.reason, error.field) == ("INSTANCE_EXISTS", "instance_id")
    daemon.stop_instance("twice")
    assert isinstance(refusal(lambda: daemon.get("twice")), NotFound)


def test_an_instance_that_is_starting_can_be_stopped(daemon: Daemon, small_model: Path) -> None:
    request = pb2.StartInstanceRequest(instance_id="short", model=str(small_model))
    operation = daemon.instances.StartInstance(request)
    for change in daemon.instances.WatchInstances(pb2.WatchInstancesRequest()):
        if change.instance.name == "instances/short":
            break
    daemon.stop_instance("short")
    error = refusal(lambda: daemon.wait(operation, pb2.Instance()))
    assert error.reason == "CANCELLED"
    assert not (daemon.state_dir / "instances" / "short").exists()


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb2.StartInstanceRequest(instance_id="Bad Id", model="/m"), "INVALID_ID", "instance_id"),
        (pb2.StartInstanceRequest(instance_id="ok"), "MODEL_REQUIRED", "model"),
        (pb2.StartInstanceRequest(instance_id="ok", model="/no/such"), "MODEL_NOT_FOUND", "model"),
        (pb2.RestoreInstanceRequest(instance_id="ok", snapshot="S"), "INVALID_ID", "snapshot"),
        (pb2.RestoreInstanceRequest(instance_id="ok", snapshot="snapshots/none"), "SNAPSHOT_NOT_FOUND", None),
        (pb2.CaptureInstanceRequest(name="instances/none", snapshot_id="s"), "INSTANCE_NOT_FOUND", "name"),
        (pb2.CaptureInstanceRequest(name="instances/none", snapshot_id="../s"), "INVALID_ID", "snapshot_id"),
        (pb2.ParkInstanceRequest(name="instances/none"), "INSTANCE_NOT_FOUND", "name"),
        (pb2.StopInstanceRequest(name="../etc"), "INVALID_NAME", "name"),
        (pb2.ListInstancesRequest(page_size=-1), "INVALID_PAGE_SIZE", "page_size"),
    ],
)
def test_bad_requests_are_refused_with_reason_and_field(
    daemon: Daemon, request_: object, reason: str, field: str | None
) -> None:
    before = daemon.instances.ListInstances(pb2.ListInstancesRequest())
    method = type(request_).__name__.removesuffix("Request")
    error = refusal(lambda: getattr(daemon.instances, method)(request_))
    assert (error.reason, error.field) == (reason, field)
    after = daemon.instances.ListInstances(pb2.ListInstancesRequest())
    assert [item.name for item in after.instances] == [item.name for item in before.instances]


def test_what_runs_on_the_cpu_goes_to_no_gpu(daemon: Daemon, instance: str) -> None:
    moved = pb2.MoveInstanceRequest(name=f"instances/{instance}", gpu="0")
    assert refusal(lambda: daemon.instances.MoveInstance(moved)).reason == "NO_GPU"
    assert daemon.get(instance).state == pb2.Instance.STATE_SERVING
    assert daemon.get(instance).gpu == ""


def test_a_start_on_a_gpu_that_is_not_here_is_refused(daemon: Daemon, small_model: Path) -> None:
    request = pb2.StartInstanceRequest(instance_id="nowhere", model=str(small_model), gpu="0")
    error = refusal(lambda: daemon.wait(daemon.instances.StartInstance(request), pb2.Instance()))
    assert (error.reason, error.field) == ("GPU_UNKNOWN", "gpu")
    daemon.stop_instance("nowhere")


def test_bytes_that_are_no_message_are_refused(daemon: Daemon) -> None:
    call: Any = daemon.channel.unary_stream("/dumont.snapshotd.v1.InferenceService/Generate")
    assert refusal(lambda: list(call(b"\xff\xff"))).reason == "MALFORMED_REQUEST"


def test_a_second_snapshotd_on_the_state_directory_or_the_port_is_refused(
    daemon: Daemon, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    def run(state_dir: Path, address: str) -> str:
        command = [sys.executable, "-m", "snapshotd.main", "--state-dir", str(state_dir), "--listen", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        return done.stderr

    assert "STATE_IN_USE" in run(daemon.state_dir, f"127.0.0.1:{free_port()}")
    assert "ADDRESS_IN_USE" in run(tmp_path / "other", daemon.address)


def test_its_state_is_for_root_alone(daemon: Daemon, instance: str) -> None:
    for path in [daemon.state_dir, *daemon.state_dir.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            assert path.stat().st_mode & 0o077 == 0, path
    assert (daemon.state_dir / "instances" / instance / "host.sock").stat().st_mode & 0o077 == 0


def test_the_node_describes_itself(daemon: Daemon) -> None:
    node = daemon.nodes.GetNode(nodes_pb2.GetNodeRequest())
    assert node.checkpoint_capable
    assert node.cpu_count == os.cpu_count()
    assert {finding.check for finding in node.findings} >= {"root", "criu", "cgroup2"}
    assert all(finding.passed for finding in node.findings)


def test_logs_of_an_instance_can_be_read(daemon: Daemon, instance: str) -> None:
    request = pb2.StreamInstanceLogsRequest(name=f"instances/{instance}")
    text = b"".join(part.data for part in daemon.instances.StreamInstanceLogs(request, timeout=10))
    assert isinstance(text, bytes)
    tail = pb2.StreamInstanceLogsRequest(name=f"instances/{instance}", tail_lines=1)
    last = b"".join(part.data for part in daemon.instances.StreamInstanceLogs(tail, timeout=10))
    assert last == b"".join(text.splitlines(keepends=True)[-1:])


def test_sigterm_drains_and_ends_everything_that_it_was_told_to_end(daemon: Daemon, instance: str) -> None:
    pid = daemon.get(instance).pid
    assert daemon.terminate() == 0
    assert not Path(f"/proc/{pid}").exists()
    assert not list((daemon.state_dir / "shims").iterdir())
    daemon.start()


@pytest.mark.parametrize("connected", [False, True])
def test_a_spare_shim_ends_with_its_daemon(
    criu: Path, tmp_path: Path, free_port: Callable[[], int], connected: bool
) -> None:
    with Daemon(tmp_path / "state", free_port()) as daemon:
        # given: the spare, as soon as it is there, or once it has a name
        while not (shims := _shims_of(daemon.state_dir)) or (
            connected and not list((daemon.state_dir / "shims").glob("shim-*.sock"))
        ):
            pass
        descriptors = [os.pidfd_open(pid) for pid in shims]

        # when
        daemon.kill()

        # then
        for descriptor in descriptors:
            ended, _, _ = select.select([descriptor], [], [], 30)
            assert ended
            os.close(descriptor)
        assert _shims_of(daemon.state_dir) == []


def test_the_next_daemon_removes_what_a_shim_left_that_never_had_a_socket(
    criu: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    shims = tmp_path / "state" / "shims"
    (shims / "shim-1.sock.root").mkdir(parents=True)
    for name in ("shim-1.log", ".shim-1.sock"):
        (shims / name).touch()
    with Daemon(tmp_path / "state", free_port()) as daemon:
        assert daemon.terminate() == 0
    assert list(shims.iterdir()) == []


def _shims_of(state_dir: Path) -> list[int]:
    """Pids of the shims whose sockets lie in a state directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"{state_dir}/shims/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def shim_of(pid: int) -> int:
    """The pid of a model host's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def refusal(call: Callable[[], object]) -> DumontError:
    """The error that ``call`` ends with."""
    try:
        call()
    except grpc.RpcError as error:
        return from_rpc_error(error)
    except DumontError as error:
        return error
    raise AssertionError("it was not refused")

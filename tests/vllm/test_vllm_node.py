"""A node with the real vLLM: its environment, its options, its snapshots and its versions."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dumont.errors import DumontError
from dumont.rpc.structs import from_struct
from dumont.snapshotd.v1 import instance_service_pb2 as pb2
from dumont.snapshotd.v1 import node_service_pb2 as nodes_pb2
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from snapshotd.engines import environment
from tests.conftest import pick_port
from tests.helpers.stand_in_engine import stand_in
from tests.node.daemon import Daemon

pytestmark = [pytest.mark.node, pytest.mark.vllm]

OPTIONS = {"max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True}
LONG = "word " * 200
STOP = ("--stop-instances-on-exit",)


@pytest.fixture(scope="module")
def daemon(criu: Path, vllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ("--engine-python", f"vllm={vllm}", *STOP)
    with Daemon(tmp_path_factory.mktemp("node") / "state", pick_port()(), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def instance(daemon: Daemon, instruct_model: Path) -> pb2.Instance:
    """An instance ``one`` that serves, and a snapshot of it of that name."""
    daemon.start_instance("one", instruct_model, "vllm", OPTIONS)
    request = pb2.CaptureInstanceRequest(name="instances/one", snapshot_id="one")
    snapshot = snapshots_pb2.Snapshot()
    daemon.wait(daemon.instances.CaptureInstance(request), snapshot)
    assert from_struct(snapshot.engine_options) == OPTIONS
    return daemon.get("one")


def test_its_version_is_the_one_that_the_node_reports(daemon: Daemon, vllm: Path) -> None:
    (engine,) = daemon.nodes.GetNode(nodes_pb2.GetNodeRequest()).engines
    assert (engine.name, engine.python) == ("vllm", str(vllm))
    assert engine.version == environment.examine("vllm", vllm).version


def test_its_options_reach_the_engine(daemon: Daemon, instance: pb2.Instance) -> None:
    assert instance.engine == "vllm"
    assert from_struct(instance.engine_options) == OPTIONS
    assert instance.capacity.sequences == OPTIONS["max_num_seqs"]
    with pytest.raises(DumontError) as refusal:
        daemon.generate("one", LONG)
    assert refusal.value.reason == "PROMPT_TOO_LONG"


def restore(daemon: Daemon, name: str) -> None:
    request = pb2.RestoreInstanceRequest(instance_id=name, snapshot="snapshots/one")
    daemon.wait(daemon.instances.RestoreInstance(request), pb2.Instance())


def test_a_restored_instance_answers_as_its_source_and_keeps_its_options(
    daemon: Daemon, instance: pb2.Instance
) -> None:
    before = daemon.generate("one", tokens=12)
    restore(daemon, "copy")
    assert daemon.generate("copy", tokens=12) == before
    assert from_struct(daemon.get("copy").engine_options) == OPTIONS
    daemon.stop_instance("copy")


def test_a_value_that_only_vllm_can_refuse_fails_the_start_by_name(
    daemon: Daemon, instruct_model: Path
) -> None:
    # Its weights are not quantised like that.
    with pytest.raises(DumontError) as refusal:
        daemon.start_instance("wrong", instruct_model, "vllm", {"quantization": "gptq"})
    assert refusal.value.reason == "OPTION_REFUSED"
    assert "gptq" in refusal.value.message
    assert daemon.get("wrong").state == pb2.Instance.STATE_FAILED
    daemon.stop_instance("wrong")


def test_an_engine_that_is_killed_while_it_is_imported_fails_its_start_alone(
    daemon: Daemon, instance: pb2.Instance, instruct_model: Path
) -> None:
    failures: list[DumontError] = []

    def start() -> None:
        try:
            daemon.start_instance("killed", instruct_model, "vllm", OPTIONS)
        except DumontError as error:
            failures.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    deadline = time.monotonic() + 60
    pid = 0
    while not pid and time.monotonic() < deadline:
        time.sleep(0.1)
        try:
            pid = daemon.get("killed").pid
        except DumontError:
            continue
    os.kill(pid, signal.SIGKILL)
    starting.join(timeout=60)

    (failure,) = failures
    assert failure.reason == "HOST_LOST"
    daemon.stop_instance("killed")
    assert daemon.generate("one", tokens=4)


def test_a_snapshot_is_restored_where_the_environment_lies_elsewhere(
    daemon: Daemon, instance: pb2.Instance, vllm: Path, tmp_path: Path
) -> None:
    # Given a node whose environment has the same files at another place
    before = daemon.generate("one", tokens=12)
    here = environment.examine("vllm", vllm)
    shutil.copytree(here.directory, tmp_path / "elsewhere", symlinks=True, copy_function=linked)
    daemon.terminate()
    daemon.flags = ("--engine-python", f"vllm={tmp_path}/elsewhere/{here.program}", *STOP)
    daemon.start()

    restore(daemon, "moved")

    assert daemon.generate("moved", tokens=12) == before
    directory = Path(f"/proc/{daemon.get('moved').pid}/root/run/dumont-engines/vllm")
    assert directory.stat().st_ino == (tmp_path / "elsewhere").stat().st_ino


def linked(source: str, target: str) -> None:
    """A copy without its bytes, where that is possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def test_a_snapshot_of_another_version_is_refused_by_name(
    daemon: Daemon, instance: pb2.Instance, vllm: Path, tmp_path: Path
) -> None:
    # Given the node of that snapshot, now with another version of the engine
    here = environment.examine("vllm", vllm)
    facts = {name: version for name, version in here.facts.items() if name != "python"}
    other = stand_in(tmp_path / "other", here.facts["python"], **(facts | {"vllm": "99.1"}))
    daemon.terminate()
    daemon.flags = ("--engine-python", f"vllm={other}", *STOP)
    daemon.start()

    # Then it says so of the snapshot, and refuses to restore it
    listed = daemon.snapshots.ListSnapshots(snapshots_pb2.ListSnapshotsRequest()).snapshots
    assert [snapshot.name for snapshot in listed] == ["snapshots/one"]
    assert f"vllm was {here.version} at capture and is 99.1" in listed[0].incompatibility
    with pytest.raises(DumontError) as refusal:
        restore(daemon, "late")
    assert refusal.value.reason == "INCOMPATIBLE"
    assert refusal.value.metadata["fact"] == "vllm"
    assert daemon.get("late").state == pb2.Instance.STATE_FAILED

"""A model's directory belongs to others: it may change, or hold what is no file, and the node notices."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from dumont.errors import FailedPrecondition
from dumont.rpc.status import from_rpc_error
from dumont.snapshotd.v1 import instance_service_pb2 as pb2
from dumont.snapshotd.v1 import snapshot_service_pb2 as snapshots_pb2
from tests.node.daemon import Daemon

pytestmark = pytest.mark.node

NOTICED_SECONDS = 30.0
# A daemon with a thread that never ends, as one that reads from a mount that hangs.
HUNG = """
import sys, threading, snapshotd.main as main
# What it is to run is "python -m module file", and then its flags.
sys.argv[1:5] = []
main.CLEAN_UP_SECONDS = 1.0
threading.Thread(target=threading.Event().wait).start()
main.main()
"""


@pytest.fixture(scope="module")
def daemon(
    criu: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    state_dir = tmp_path_factory.mktemp("daemon") / "state"
    with Daemon(state_dir, free_port(), "--stop-instances-on-exit") as running:
        yield running


@pytest.fixture
def model(embedding_model: Path, tmp_path: Path) -> Path:
    """A model of the test's own."""
    return Path(shutil.copytree(embedding_model, tmp_path / "model"))


def restore(daemon: Daemon, instance: str, snapshot: str) -> None:
    request = pb2.RestoreInstanceRequest(instance_id=instance, snapshot=f"snapshots/{snapshot}")
    daemon.wait(daemon.instances.RestoreInstance(request), pb2.Instance())


def capture(daemon: Daemon, instance: str, snapshot: str) -> None:
    request = pb2.CaptureInstanceRequest(name=f"instances/{instance}", snapshot_id=snapshot)
    daemon.wait(daemon.instances.CaptureInstance(request), snapshots_pb2.Snapshot())


def test_changes_of_a_model_are_noticed(daemon: Daemon, model: Path) -> None:
    # Given an instance, and a snapshot of it
    daemon.start_instance("one", model)
    capture(daemon, "one", "before")

    # When a file other than the weights is edited
    config = model / "tokenizer_config.json"
    was = config.read_bytes()
    config.write_bytes(was + b"\n")

    # Then the snapshot is not restored, and says why; with the file as it was, it is
    with pytest.raises(FailedPrecondition, match=r"before tokenizer_config\.json changed") as refused:
        restore(daemon, "other", "before")
    assert refused.value.reason == "MODEL_CHANGED"
    config.write_bytes(was)
    restore(daemon, "two", "before")

    # When the weights that both of them map are written to
    with (model / "model.safetensors").open("r+b") as weights:
        weights.write(weights.read(1))

    # Then neither goes on, and each says why
    with pytest.raises(FailedPrecondition) as refused:
        capture(daemon, "one", "after")
    assert refused.value.reason == "WEIGHTS_OVERWRITTEN"
    end = time.monotonic() + NOTICED_SECONDS
    while daemon.get("two").state != pb2.Instance.STATE_FAILED and time.monotonic() < end:
        time.sleep(0.1)
    for instance in ("one", "two"):
        assert daemon.get(instance).state == pb2.Instance.STATE_FAILED
        assert daemon.get(instance).failure_reason == "WEIGHTS_OVERWRITTEN"
    daemon.stop_instance("one")
    daemon.stop_instance("two")


def test_directories_with_pipes_in_place_of_files_disturb_nobody(daemon: Daemon, model: Path) -> None:
    # Given more starts of such a model than the node has threads
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    for attempt in range(20):
        request = pb2.StartInstanceRequest(instance_id=f"pipe-{attempt}", model=str(model))
        with pytest.raises(grpc.RpcError) as refused:
            daemon.instances.StartInstance(request, timeout=10)
        assert from_rpc_error(refused.value).reason == "MODEL_INVALID"

    # Then others start as before
    (model / "config.json").unlink()
    shutil.copy(model / "sentence_bert_config.json", model / "config.json")
    with pytest.raises(FailedPrecondition):
        daemon.start_instance("unfit", model)


def test_sigterm_ends_a_daemon_whose_threads_hang(
    criu: Path, free_port: Callable[[], int], tmp_path: Path
) -> None:
    within = [sys.executable, "-c", HUNG]
    hung = Daemon(tmp_path / "state", free_port(), "--drain-seconds", "0", within=within)
    hung.start()
    process = hung.process
    assert process is not None

    os.kill(process.pid, signal.SIGTERM)

    assert process.wait(timeout=20) != 0
    hung.terminate()

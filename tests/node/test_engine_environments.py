"""Engines under an interpreter of their own, with one that stands in: what a node does with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from dumont.errors import DumontError, FailedPrecondition
from dumont.rpc.status import from_rpc_error
from dumont.snapshotd.v1 import instance_service_pb2 as pb2
from dumont.snapshotd.v1 import node_service_pb2 as nodes_pb2
from tests.conftest import pick_port
from tests.helpers.stand_in_engine import program, stand_in
from tests.node.daemon import ROOT, Daemon

pytestmark = pytest.mark.node

# What a model host of the stand-in does: it says what it sees, and then waits for ever.
HOST = r"""
case "$*" in
"-m model_host")
  echo "runs as $0"
  echo "packages $(ls $PYTHONPATH | tr '\n' ' ')"
  touch "$(dirname "$0")/written" 2>&1
  exec sleep 1000;;
esac
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("environment") / "vllm"
    python = stand_in(directory)
    answer = python.read_text().partition("\n")[2]
    program(python, HOST + answer)
    return directory


@pytest.fixture(scope="module")
def daemon(criu: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ("--engine-python", f"vllm={environment}/bin/python", "--stop-instances-on-exit")
    with Daemon(tmp_path_factory.mktemp("node") / "state", pick_port()(), *flags) as running:
        yield running


def log_of(daemon: Daemon, instance: str, line: str) -> str:
    """The log of an instance, once it has ``line``."""
    path = daemon.state_dir / "instances" / instance / "host.log"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and line in (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{line!r} did not come: {path.read_text() if path.exists() else 'no log'}")


def test_a_node_tells_which_engines_it_has(daemon: Daemon, environment: Path) -> None:
    node = daemon.nodes.GetNode(nodes_pb2.GetNodeRequest())
    (engine,) = node.engines
    assert (engine.name, engine.version, engine.python) == (
        "vllm",
        "0.32.0",
        f"{environment}/bin/python",
    )


def test_a_model_host_that_is_killed_during_its_start_fails_by_name_and_leaves_nothing(
    daemon: Daemon, small_model: Path, environment: Path
) -> None:
    # Given a start that is under way, in the engine's own environment
    failures: list[DumontError] = []

    def start() -> None:
        try:
            daemon.start_instance("killed", small_model, "vllm", {"max_model_len": 64})
        except DumontError as error:
            failures.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    log = log_of(daemon, "killed", "Read-only file system")
    assert "runs as /run/dumont-engines/vllm/bin/python" in log
    assert "packages dumont model_host" in log
    assert not (environment / "bin" / "written").exists()

    # When its process is killed
    os.kill(daemon.get("killed").pid, signal.SIGKILL)
    starting.join(timeout=60)

    # Then the start has failed and says why, and the node goes on
    (failure,) = failures
    assert failure.reason == "HOST_LOST"
    failed = daemon.get("killed")
    assert (failed.state, failed.failure_reason) == (pb2.Instance.STATE_FAILED, "HOST_LOST")
    daemon.stop_instance("killed")
    assert list((daemon.state_dir / "instances").iterdir()) == []
    daemon.start_instance("other", small_model)
    assert daemon.generate("other", tokens=2)
    daemon.stop_instance("other")


def refusal(call: Callable[[], object]) -> DumontError:
    try:
        call()
    except grpc.RpcError as error:
        return from_rpc_error(error)
    except DumontError as error:
        return error
    raise AssertionError("it was not refused")


def test_options_are_checked_before_anything_starts(daemon: Daemon, small_model: Path) -> None:
    for engine, options, reason in (
        ("vllm", {"max_model_length": 1}, "UNKNOWN_OPTION"),
        ("vllm", {"tensor_parallel_size": 2}, "OPTION_REFUSED"),
        ("vllm", {"dtype": "int4"}, "INVALID_OPTION"),
        ("causal_lm", {"max_model_len": 64}, "UNKNOWN_OPTION"),
        ("embedding", {"max_model_len": 64}, "ENGINE_WITHOUT_OPTIONS"),
    ):
        error = refusal(lambda e=engine, o=options: daemon.start_instance("wrong", small_model, e, o))  # type: ignore[misc]
        assert error.reason == reason
        assert (error.field or "").startswith("engine_options")
    assert refusal(lambda: daemon.get("wrong")).reason == "INSTANCE_NOT_FOUND"


def test_a_node_without_the_engine_refuses_it_and_says_how_to_install_it(
    criu: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a machine on which no engine is installed
    monkeypatch.setenv("DUMONT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DUMONT_CRIU", str(criu))
    with Daemon(tmp_path / "state", pick_port()()) as daemon:
        assert not daemon.nodes.GetNode(nodes_pb2.GetNodeRequest()).engines

        error = refusal(lambda: daemon.start_instance("none", small_model, "vllm"))
        resolve = nodes_pb2.ResolveModelRequest(model=str(small_model), engine="vllm")
        asked = refusal(lambda: daemon.nodes.ResolveModel(resolve))

    for one in (error, asked):
        assert isinstance(one, FailedPrecondition)
        assert one.reason == "ENGINE_NOT_INSTALLED"
        assert "dumont engine install vllm" in one.message


@pytest.mark.parametrize(
    ("python", "said"),
    [("vllm=/no/such/python", "there is no such program"), ("vllm", "--engine-python must be like")],
)
def test_an_interpreter_that_cannot_be_used_is_refused_at_the_start(
    criu: Path, tmp_path: Path, python: str, said: str
) -> None:
    command = [sys.executable, "-m", "snapshotd.main", "--state-dir", str(tmp_path / "state")]
    done = subprocess.run(
        [*command, "--listen", f"127.0.0.1:{pick_port()()}", "--engine-python", python, "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr

"""A controller that is killed comes back to what it left: nothing is lost, nothing started twice."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import dumont
from tests.e2e.stack import STOP_SECONDS, Grpcurl, command

pytestmark = pytest.mark.node

PROMPT = "The capital of France is"


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """One of our commands, its log on a pipe; ended with SIGTERM if it has not ended before."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=STOP_SECONDS)


def read_until(process: subprocess.Popen[str], event: str) -> None:
    """Returns when the log says that ``event`` happened."""
    assert process.stdout is not None
    events = []
    for line in process.stdout:
        events.append(json.loads(line).get("event"))
        if events[-1] == event:
            return
    pytest.fail(f"the log ended without {event}; it had {events}")


def test_a_killed_controller_finds_its_instances_again_and_starts_nothing_twice(
    criu: Path, grpcurl: Path, instruct_model: Path, free_port: Callable[[], int], tmp_path: Path
) -> None:
    controller, snapshotd = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    start_controller = (
        command("dumont-controller"), "--listen", controller, "--state-dir", str(tmp_path / "controller"),
    )  # fmt: skip
    start_snapshotd = (
        command("dumont-snapshotd"), "--listen", snapshotd, "--state-dir", str(tmp_path / "snapshotd"),
        "--controller", controller, "--drain-seconds", "1", "--stop-instances-on-exit",
    )  # fmt: skip
    with ExitStack() as exits:
        # Given one instance that serves
        first = exits.enter_context(running(*start_controller))
        exits.enter_context(running(*start_snapshotd))
        read_until(first, "node_ready")
        with dumont.Client(controller) as client:
            before = client.deploy(str(instruct_model), name="qa").generate(PROMPT, max_new_tokens=8)
            pid = client.instances.get(before.start.instance).pid
            snapshots = [snapshot.name for snapshot in client.snapshots.list()]

        # When the controller is killed and another one takes its place
        first.kill()
        first.wait(STOP_SECONDS)
        second = exits.enter_context(running(*start_controller))
        read_until(second, "node_ready")

        # Then it knows the deployment, and the same process answers
        with dumont.Client(controller) as client:
            after = client.deployments.get("qa").generate(PROMPT, max_new_tokens=8)
            assert after.text == before.text
            assert after.start.tier == "resident"
            assert after.start.instance == before.start.instance
            assert client.instances.get(after.start.instance).pid == pid
            assert [snapshot.name for snapshot in client.snapshots.list()] == snapshots

        # And the node has started nothing else
        (listed,) = Grpcurl(grpcurl, snapshotd).call("dumont.snapshotd.v1.InstanceService/ListInstances")
        assert [instance["pid"] for instance in listed["instances"]] == [pid]

"""A controller that lost its database, or has a wrong one, deletes nothing; nor does a stranger's.

One node serves all tests of this module, in their order. The controller is killed before each of them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

import dumont
from dumont.controller.v1 import node_service_pb2 as nodes_pb
from dumont.controller.v1 import node_service_pb2_grpc
from dumont.rpc.status import from_rpc_error
from tests.e2e.stack import ANSWER_SECONDS, STOP_SECONDS, Grpcurl, command

pytestmark = pytest.mark.node

PROMPT = "The capital of France is"
# What was unknown used to be deleted within six seconds.
PATIENCE = 7.0


class Site:
    """A node that stays, and controllers that come and go."""

    def __init__(self, directory: Path, ports: Sequence[int], grpcurl: Path, exits: ExitStack) -> None:
        self.directory = directory
        self.state = directory / "controller"
        self.database = self.state / "controller.db"
        self.address, self.node_address, self.stranger_address = (f"127.0.0.1:{port}" for port in ports)
        self.node = Grpcurl(grpcurl, self.node_address)
        self._exits = exits
        self.controller: subprocess.Popen[bytes]
        # What the deployment answers, what the node holds for it, and the database from before it.
        self.text = ""
        self.before: tuple[list[str], list[str]] = ([], [])
        self.backup = b""

    def start(self, *arguments: str, program: str, log: str) -> subprocess.Popen[bytes]:
        """Run a service until the tests end; its log goes to a file."""
        with (self.directory / log).open("ab") as output:
            process = subprocess.Popen([command(program), *arguments], stdout=output, stderr=output)
        self._exits.callback(_end, process)
        return process

    def start_controller(self, *arguments: str) -> None:
        self.controller = self.start(
            "--listen", self.address, "--state-dir", str(self.state), *arguments,
            program="dumont-controller", log="controller.log",
        )  # fmt: skip

    def kill_controller(self) -> None:
        self.controller.send_signal(signal.SIGKILL)
        self.controller.wait(STOP_SECONDS)

    def refused_start(self, *arguments: str) -> str:
        """What a controller says that does not start."""
        done = subprocess.run(
            [command("dumont-controller"), "--listen", "127.0.0.1:0", *arguments],
            capture_output=True, text=True, timeout=STOP_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        return done.stderr

    def wait_for_node(self) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            try:
                with dumont.Client(self.address) as client:
                    if [node.state for node in client.nodes.list()] == ["ready"]:
                        return
            except dumont.DumontError:
                pass
            time.sleep(0.1)
        pytest.fail((self.directory / "controller.log").read_text()[-2000:])

    def dumont(self, *words: str) -> Any:
        done = subprocess.run(
            [command("dumont"), *words, "--json", "--endpoint", self.address],
            capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def held(self) -> tuple[list[str], list[str]]:
        """The instances and the snapshots of the node and its object store, as it tells itself."""
        instances = self.node.call("dumont.snapshotd.v1.InstanceService/ListInstances")[0]
        snapshots = self.node.call("dumont.snapshotd.v1.SnapshotService/ListSnapshots")[0]
        return (
            [instance["name"] for instance in instances.get("instances", ())],
            [snapshot["name"] for snapshot in snapshots.get("snapshots", ()) if snapshot["published"]],
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(STOP_SECONDS)


@pytest.fixture(scope="module")
def site(
    criu: Path,
    grpcurl: Path,
    instruct_model: Path,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """A deployment that serves, and whose snapshot is on the node and in the object store."""
    directory = tmp_path_factory.mktemp("lost")
    with ExitStack() as exits:
        made = Site(directory, [free_port() for _ in range(3)], grpcurl, exits)
        made.start_controller()
        made.start(
            "--listen", made.node_address, "--state-dir", str(directory / "snapshotd"),
            "--controller", made.address, "--drain-seconds", "1", "--heartbeat-seconds", "1",
            "--stop-instances-on-exit", "--store-url", f"file://{directory / 'store'}",
            program="dumont-snapshotd", log="snapshotd.log",
        )  # fmt: skip
        made.wait_for_node()
        made.backup = made.database.read_bytes()
        with dumont.Client(made.address) as client:
            deployment = client.deploy(str(instruct_model), name="qa", checkpoint={"storage": "s3"})
            made.text = deployment.generate(PROMPT, max_new_tokens=8).text
            deadline = time.monotonic() + STOP_SECONDS
            while not all(snapshot.published for snapshot in client.snapshots.list()):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        made.before = made.held()
        assert [len(names) for names in made.before] == [1, 1]
        yield made


def test_a_second_controller_on_the_state_directory_is_told_who_has_it(site: Site) -> None:
    told = site.refused_start("--state-dir", str(site.state))
    assert f"dumont-controller with process id {site.controller.pid}, on {site.address}" in told
    elsewhere = ("--state-dir", str(site.directory / "elsewhere"))
    url = f"sqlite+aiosqlite:///{site.directory / 'shared.db'}"
    first = site.start(
        *elsewhere, "--listen", "127.0.0.1:0", "--database", url, program="dumont-controller", log="x"
    )
    deadline = time.monotonic() + STOP_SECONDS
    while not (site.directory / "shared.db").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = site.refused_start("--state-dir", str(site.directory / "third"), "--database", url)
    assert f"process id {first.pid}" in told
    _end(first)


@pytest.mark.parametrize("damage", ["garbled", "removed"])
def test_a_damaged_log_of_the_database_loses_no_deployment(site: Site, damage: str) -> None:
    site.kill_controller()
    log = site.database.with_name("controller.db-wal")
    if damage == "removed":
        log.unlink(missing_ok=True)
    else:
        data = log.read_bytes()
        log.write_bytes(b"\xa5" * min(5000, len(data)) + data[5000:])
    site.start_controller()
    site.wait_for_node()
    with dumont.Client(site.address) as client:
        answer = client.deployments.get("qa").generate(PROMPT, max_new_tokens=8)
        assert (answer.text, answer.start.tier) == (site.text, "resident")
        assert [snapshot.orphan for snapshot in client.snapshots.list()] == [False]
    assert site.held() == site.before


def test_a_database_from_before_the_deployment_deletes_nothing(site: Site) -> None:
    # Given a controller whose database is a backup from before there was any deployment
    site.kill_controller()
    for log in site.state.glob("controller.db-*"):
        log.unlink()
    lost = site.database.read_bytes()
    site.database.write_bytes(site.backup)
    site.start_controller()
    site.wait_for_node()
    time.sleep(PATIENCE)
    # Then what there is is shown, and is there when the right one is found again
    assert [one["name"] for one in site.dumont("snapshot", "ls", "--orphans")] == site.before[1]
    assert site.held() == site.before
    site.kill_controller()
    for log in site.state.glob("controller.db-*"):
        log.unlink()
    site.database.write_bytes(lost)
    site.start_controller()
    site.wait_for_node()
    assert site.dumont("snapshot", "ls", "--orphans") == []
    assert site.held() == site.before


def test_a_stranger_s_controller_can_do_nothing_to_the_node(site: Site) -> None:
    # Given a controller that nobody told the node about
    stranger = site.start(
        "--listen", site.stranger_address, "--state-dir", str(site.directory / "stranger"),
        program="dumont-controller", log="stranger.log",
    )  # fmt: skip
    owner = (site.directory / "snapshotd" / "controller").read_text()
    with grpc.insecure_channel(site.stranger_address) as channel:
        stub = node_service_pb2_grpc.NodeServiceStub(channel)
        request = nodes_pb.RegisterNodeRequest(
            node_id="mine", node=nodes_pb.Node(endpoint=site.node_address), controller_id=owner
        )
        # When the node comes to it, by a wrong address, then it is sent away
        with pytest.raises(grpc.RpcError) as refusal:
            stub.RegisterNode(request, wait_for_ready=True, timeout=STOP_SECONDS)
        error = from_rpc_error(refusal.value)
        assert error.reason == "WRONG_CONTROLLER"
        assert error.metadata["owner"] == owner
        # And when it knows the node's address all the same, the node names whom it belongs to
        request.controller_id = ""
        stub.RegisterNode(request, timeout=STOP_SECONDS)
    deadline = time.monotonic() + STOP_SECONDS
    while f"belongs to controller {owner}" not in (site.directory / "stranger.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    _end(stranger)
    assert site.held() == site.before


def test_a_lost_database_deletes_nothing_and_what_there_is_can_be_adopted(site: Site) -> None:
    # Given a controller whose database is gone
    site.kill_controller()
    for file in site.state.glob("controller.db*"):
        file.unlink()

    # Then it does not begin anew without being told to
    told = site.refused_start("--state-dir", str(site.state))
    assert "the database is empty" in told
    assert "--accept-database" in told

    # And when it is told to, it deletes nothing, and shows what it does not know
    site.start_controller("--accept-database")
    site.wait_for_node()
    time.sleep(PATIENCE)
    assert site.held() == site.before
    (orphan,) = site.dumont("snapshot", "ls", "--orphans")
    assert (orphan["deployment"], orphan["orphan"]) == ("deployments/qa", True)
    (instance,) = site.dumont("ps")
    assert instance["orphan"]

    # And what is adopted answers again: by the instance that was there, and from the snapshot
    site.dumont("snapshot", "adopt", orphan["name"])
    with dumont.Client(site.address) as client:
        answer = client.deployments.get("qa").generate(PROMPT, max_new_tokens=8)
        assert (answer.text, answer.start.tier) == (site.text, "resident")
        client.instances.stop(answer.start.instance)
        again = client.deployments.get("qa").generate(PROMPT, max_new_tokens=8)
        assert (again.text, again.start.tier) == (site.text, "local")
    assert site.dumont("snapshot", "ls", "--orphans") == []


def test_a_deleted_snapshot_is_brought_back(site: Site) -> None:
    (known,) = site.dumont("snapshot", "ls")
    site.dumont("snapshot", "rm", known["name"])
    assert site.dumont("snapshot", "ls") == []
    undeleted = site.dumont("snapshot", "undelete", known["name"])
    assert (undeleted["orphan"], undeleted["published"], undeleted["local"]) == (True, True, False)
    site.dumont("snapshot", "adopt", known["name"])
    with dumont.Client(site.address) as client:
        for instance in client.instances.list():
            client.instances.stop(instance.name)
        answer = client.deployments.get("qa").generate(PROMPT, max_new_tokens=8)
    assert (answer.text, answer.start.tier) == (site.text, "remote")

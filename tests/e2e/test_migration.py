"""Real models migrate between two nodes of one machine under load, and a drained node is empty.

Every answer must be the one that the model gives at rest: a token that was lost or doubled would show.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

import dumont
from dumont.errors import DumontError
from tests.e2e.stack import STOP_SECONDS, Controller, command

pytestmark = pytest.mark.node

# Its continuation is so likely that the size of a batch, which changes the last bits, changes no token.
PROMPT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,"
TOKENS = 48
STREAMS = 4


@dataclass
class Fleet:
    """Two nodes with a shared store and one controller."""

    root: Path
    controller: Controller
    free_port: Callable[[], int]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        words = (
            command("dumont-snapshotd"), "--listen", f"127.0.0.1:{self.free_port()}", "--node-id", name,
            "--state-dir", str(self.root / name), "--controller", self.controller.endpoint,
            "--drain-seconds", "1", "--store-url", f"file://{self.root}/bucket",
            "--trusted-keys-file", str(self.root / "trusted"), "--stop-instances-on-exit",
        )  # fmt: skip
        (self.root / "trusted").touch()
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(words, stdout=log, stderr=log)
        self.controller.read_until(event="node_ready", node=name)
        with (self.root / "trusted").open("a") as file:
            file.write((self.root / name / "signing.pub").read_text())

    def kill(self, name: str) -> None:
        """End a node and all that runs there, as if its machine had lost power."""
        process = self.processes.pop(name)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        state = str(self.root / name)
        family += [p for p in psutil.process_iter() if any(state in word for word in _words(p))]
        for member in family:
            for one in [member, *_children(member)]:
                _signal(one)
        process.wait(STOP_SECONDS)

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(STOP_SECONDS)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _signal(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.Error:
        return


@pytest.fixture
def fleet(criu: Path, free_port: Callable[[], int], tmp_path: Path) -> Iterator[Fleet]:
    # Heartbeats that a machine under load does not miss.
    controller = Controller(f"127.0.0.1:{free_port()}", tmp_path / "controller", heartbeat=5.0)
    made = Fleet(tmp_path, controller, free_port)
    try:
        for name in ("first", "second"):
            made.start(name)
        yield made
    finally:
        made.close()
        controller.close()


class Load:
    """Callers that ask again and again, each for the same answer; ``with`` bounds their time."""

    def __init__(self, client: dumont.Client, expected: str) -> None:
        self.answers: list[str] = []
        self.errors: list[DumontError] = []
        self.nodes: set[str] = set()
        self._client = client
        self._expected = expected
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(STREAMS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self) -> None:
        deployment = self._client.deployments.get("qa")
        while not self._ended.is_set():
            try:
                answer = deployment.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, timeout=100)
            except DumontError as error:
                self.errors.append(error)
            else:
                self.answers.append(answer.text)
                self.nodes.add(answer.start.node)

    def wrong(self) -> list[str]:
        return [answer for answer in self.answers if answer != self._expected]


@pytest.fixture
def client(fleet: Fleet) -> Iterator[dumont.Client]:
    with dumont.Client(fleet.controller.endpoint) as made:
        yield made


@pytest.fixture
def expected(client: dumont.Client, instruct_model: Path) -> str:
    """A deployment ``qa``, captured and serving, and what it says."""
    deployment = client.deploy(str(instruct_model), name="qa")
    return deployment.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True).text


def serving(client: dumont.Client) -> dumont.Instance:
    (found,) = client.instances.list("qa")
    return found


def other(instance: dumont.Instance) -> str:
    return "second" if instance.node == "nodes/first" else "first"


def test_no_request_fails_and_no_token_is_lost_while_it_migrates_there_and_back(
    client: dumont.Client, expected: str
) -> None:
    home = serving(client)
    with Load(client, expected) as load:
        for _ in range(3):
            here = serving(client)
            there = client.instances.migrate(here.name, node=other(here))
            assert there.node == f"nodes/{other(here)}"
            assert serving(client).name == there.name
    assert (load.errors, load.wrong()) == ([], [])
    assert load.nodes == {"nodes/first", "nodes/second"}
    assert serving(client).node != home.node
    assert ", 20, 21, 22, 23," in expected


def test_the_source_is_killed_while_the_target_is_restored(client: dumont.Client, expected: str) -> None:
    source = serving(client)
    stages: list[str] = []

    def kill_at_restore(stage: str) -> None:
        stages.append(stage)
        if stage == "restoring" and "restoring" not in stages[:-1]:
            os.kill(source.pid, signal.SIGKILL)

    with Load(client, expected) as load:
        there = client.instances.migrate(source.name, node=other(source), progress=kill_at_restore)
    assert there.node == f"nodes/{other(source)}"
    # What had begun at the source could not be finished; its callers were told, and each may ask again.
    assert {error.code for error in load.errors} <= {"UNAVAILABLE"}
    assert len(load.errors) <= STREAMS
    assert load.wrong() == []
    assert (
        client.deployments.get("qa").generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True).text == expected
    )


def test_the_target_is_killed_and_the_source_serves_on(
    fleet: Fleet, client: dumont.Client, expected: str
) -> None:
    source = serving(client)
    killed: list[str] = []

    def kill_at_restore(stage: str) -> None:
        if stage == "restoring" and not killed:
            killed.append(other(source))
            fleet.kill(killed[0])

    with Load(client, expected) as load:
        with pytest.raises(DumontError) as failure:
            client.instances.migrate(source.name, node=other(source), progress=kill_at_restore)
        assert failure.value.reason in ("NODE_UNAVAILABLE", "TARGET_LOST")
    assert killed
    assert (load.errors, load.wrong()) == ([], [])
    assert [i.name for i in client.instances.list("qa") if i.state == "serving"] == [source.name]


def test_a_drained_node_is_empty_and_takes_nothing(
    fleet: Fleet, client: dumont.Client, expected: str, small_model: Path
) -> None:
    home = serving(client).node.removeprefix("nodes/")
    client.deploy(str(small_model), name="embedded" if "MiniLM" in str(small_model) else "small").refresh()
    with Load(client, expected) as load:
        assert client.nodes.drain(home) == ()
    assert (load.errors, load.wrong()) == ([], [])
    assert [i for i in client.instances.list() if i.node == f"nodes/{home}"] == []
    assert not list((fleet.root / home / "journal").glob("*.json"))
    assert {node.name: node.draining for node in client.nodes.list()}[f"nodes/{home}"]

    # A restart of the node does not make it take starts.
    client.nodes.drain(home)
    assert client.deployments.get("qa").generate(PROMPT, max_new_tokens=4).start.node != f"nodes/{home}"
    assert not client.nodes.undrain(home).draining

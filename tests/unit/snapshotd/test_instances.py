"""Instances end in a state of the table whoever leaves, whatever fails and whenever the daemon dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dumont.errors import Aborted, AlreadyExists, NotFound
from snapshotd.failpoints import Failpoints
from snapshotd.instances import Instances
from snapshotd.journal import Journal
from snapshotd.model import Instance, Json, Model, State, Weights
from snapshotd.node import HostSettings, Node
from snapshotd.observer import JobObserver

MODEL = Model("org/name", "causal_lm", Path("/model"), (), 0, 512)
FILES = {"model.safetensors": "abc"}
LOADED: Json = {
    "engine": "causal_lm",
    "device": "cpu",
    "canary": {"tokens": [1], "logprob": -0.5},
    "versions": {},
    "phases": [],
}
NOW = datetime(2026, 11, 1, tzinfo=UTC)


class FakeHost:
    """A model host that obeys; ``gates`` holds what waits, ``failing`` what fails, by command."""

    def __init__(self, instance: str = "") -> None:
        self.instance = instance
        self.pid = 42
        self.lost = asyncio.Event()
        self.state = "SERVING"
        self.frozen = False
        self.released = False
        self.gates: dict[str, asyncio.Event] = {}
        self.failing: set[str] = set()
        self.reached = asyncio.Event()

    async def _do(self, command: str) -> None:
        if (gate := self.gates.get(command)) is not None:
            self.reached.set()
            await gate.wait()
        if command in self.failing:
            raise Aborted("HOST_TIMEOUT", f"{command} was not answered")

    async def launch(
        self, instance: str, directory: Path, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        await self._do("launch")
        self.instance = instance

    async def restore(self, *arguments: object) -> None:
        raise AssertionError("nothing here restores")

    async def dump(self, images: Path, timeout: float) -> Json:
        raise AssertionError("nothing here captures")

    async def call(self, command: str, timeout: float, **arguments: object) -> Json:
        await self._do(command)
        return {"load": LOADED, "status": {"state": self.state}}.get(command, {})

    async def freeze(self) -> None:
        await self._do("freeze")
        self.frozen = True

    async def thaw(self) -> None:
        await self._do("thaw")
        self.frozen = False

    async def status(self) -> Json:
        return {"instance": self.instance, "pid": self.pid, "frozen": self.frozen, "exit_status": None}

    async def release(self) -> None:
        await self._do("release")
        self.released = True


@dataclass
class FakeHosts:
    host: FakeHost = field(default_factory=FakeHost)
    found: list[FakeHost] = field(default_factory=list)

    async def take(self) -> FakeHost:
        return self.host

    async def find(self) -> list[FakeHost]:
        return self.found

    async def close(self) -> None:
        return


class FakeModels:
    async def resolve(self, name: str, engine: str = "") -> Model:
        return MODEL

    async def fetch(self, model: Model) -> Model:
        return model


@dataclass
class FakeWeights:
    held: dict[str, Mapping[str, str]] = field(default_factory=dict)

    async def digest(self, model: Model) -> str:
        return "digest"

    async def hold(self, instance: str, model: Model) -> Mapping[str, str]:
        self.held[instance] = FILES
        return FILES

    def keep(self, instance: str, files: Mapping[str, str]) -> None:
        self.held[instance] = files

    def release(self, instance: str) -> None:
        self.held.pop(instance, None)


class StillClock:
    def now(self) -> datetime:
        return NOW

    def monotonic(self) -> float:
        return 0.0


@dataclass
class World:
    instances: Instances
    hosts: FakeHosts
    weights: FakeWeights
    directory: Path

    async def started(self) -> FakeHost:
        """An instance ``one`` that serves."""
        self.instances.admit(an_instance(State.STARTING))
        await self.instances.start("one", MODEL)
        return self.hosts.host

    def left(self) -> list[str]:
        """Directories and journal entries of instances."""
        return [
            path.name for folder in ("instances", "journal") for path in (self.directory / folder).iterdir()
        ]


@pytest.fixture
def world(tmp_path: Path) -> World:
    for folder in ("instances", "journal"):
        (tmp_path / folder).mkdir()
    hosts, weights = FakeHosts(), FakeWeights()
    unused: Any = None
    node = Node(
        hosts=hosts,
        store=unused,
        models=FakeModels(),
        weights=weights,
        images=unused,
        clock=StillClock(),
        settings=HostSettings(command=("model_host",), environment={}),
        facts={},
        directory=tmp_path,
        threads=1,
    )
    observer: Callable[[str], JobObserver] = lambda instance: JobObserver(instance, None)  # noqa: E731
    return World(
        Instances(node, Journal(tmp_path / "journal"), observer, Failpoints()), hosts, weights, tmp_path
    )


def an_instance(state: State) -> Instance:
    return Instance("one", "deployments/qa", "org/name", "causal_lm", state, NOW)


async def left_by_its_caller(work: asyncio.Task[Any], host: FakeHost, gate: asyncio.Event) -> None:
    """Cancel a call that waits at the gate, then open the gate and let the call end."""
    await host.reached.wait()
    work.cancel()
    asyncio.get_running_loop().call_later(0.01, gate.set)
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_a_stop_ends_the_instance_also_when_its_caller_leaves(world: World) -> None:
    host = await world.started()
    host.gates["release"] = gate = asyncio.Event()

    await left_by_its_caller(asyncio.create_task(world.instances.stop("one")), host, gate)

    assert host.released
    assert world.instances.all() == []
    assert world.left() == []


async def test_a_park_ends_as_begun_also_when_its_caller_leaves(world: World) -> None:
    host = await world.started()
    host.gates["drain"] = gate = asyncio.Event()

    await left_by_its_caller(asyncio.create_task(world.instances.park("one")), host, gate)

    assert world.instances.get("one").state is State.PARKED
    assert not host.released


async def test_a_resume_ends_as_begun_also_when_its_caller_leaves(world: World) -> None:
    host = await world.started()
    await world.instances.park("one")
    host.gates["thaw"] = gate = asyncio.Event()

    await left_by_its_caller(asyncio.create_task(world.instances.resume("one")), host, gate)

    assert world.instances.get("one").state is State.SERVING
    assert not host.released


async def test_a_start_is_undone_when_its_caller_leaves(world: World) -> None:
    host = world.hosts.host
    host.gates["load"] = gate = asyncio.Event()
    world.instances.admit(an_instance(State.STARTING))

    await left_by_its_caller(asyncio.create_task(world.instances.start("one", MODEL)), host, gate)

    assert host.released
    assert world.instances.get("one").state is State.FAILED
    assert world.left() == []


async def test_a_stop_that_failed_is_told_and_can_be_repeated(world: World) -> None:
    host = await world.started()
    host.failing = {"release"}

    with pytest.raises(Aborted, match="release"):
        await world.instances.stop("one")
    assert world.instances.get("one").state is State.FAILED
    assert world.instances.get("one").failure_reason == "HOST_TIMEOUT"

    host.failing = set()
    await world.instances.stop("one")
    assert host.released
    with pytest.raises(NotFound):
        world.instances.get("one")


async def test_a_stop_of_what_failed_waits_until_its_process_is_gone(world: World) -> None:
    host = await world.started()
    host.gates["release"] = gate = asyncio.Event()
    host.lost.set()
    await host.reached.wait()
    assert world.instances.get("one").state is State.FAILED
    with pytest.raises(AlreadyExists):
        world.instances.admit(an_instance(State.STARTING))

    stop = asyncio.create_task(world.instances.stop("one"))
    # Every turn that it could take without the gate.
    for _ in range(20):
        await asyncio.sleep(0)
    assert not stop.done()
    gate.set()
    await stop

    assert host.released
    assert world.instances.all() == []


async def test_a_stop_in_the_middle_of_a_park_waits_until_that_has_unwound(world: World) -> None:
    host = await world.started()
    host.gates["freeze"] = asyncio.Event()
    parking = asyncio.create_task(world.instances.park("one"))
    await host.reached.wait()

    await world.instances.stop("one")

    with pytest.raises(Aborted):
        await parking
    assert host.released
    assert world.instances.all() == []


async def test_a_stop_at_the_very_end_of_another_job_is_not_taken_for_its_end(world: World) -> None:
    host = await world.started()
    host.gates["freeze"] = gate = asyncio.Event()
    host.gates["release"] = held = asyncio.Event()
    parking = asyncio.create_task(world.instances.park("one"))
    await host.reached.wait()
    # Its first step comes when the job is done and nobody has heard of that yet.
    gate.set()
    stop = asyncio.create_task(world.instances.stop("one"))
    await asyncio.wait([parking])

    assert world.instances.get("one").state is State.STOPPING
    held.set()
    await stop
    assert host.released


@pytest.mark.parametrize("state", [State.STARTING, State.RESTORING, State.STOPPING])
async def test_what_was_not_finished_is_not_taken_over(world: World, state: State) -> None:
    # given: a host that could serve, but whose canary nobody compared or whose end somebody wanted
    world.instances.journal.write(an_instance(state))
    (world.directory / "instances" / "one").mkdir()
    world.hosts.found = [FakeHost("one")]

    await world.instances.take_over()

    assert world.hosts.found[0].released
    assert world.instances.all() == []
    assert world.left() == []


@pytest.mark.parametrize(
    ("state", "frozen", "expected"),
    [
        (State.SERVING, False, State.SERVING),
        (State.CAPTURING, False, State.SERVING),
        (State.PARKING, False, State.SERVING),
        (State.PARKING, True, State.PARKED),
        (State.PARKED, True, State.PARKED),
        (State.RESUMING, True, State.PARKED),
        (State.RESUMING, False, State.SERVING),
    ],
)
async def test_what_was_whole_is_taken_over(
    world: World, state: State, frozen: bool, expected: State
) -> None:
    world.instances.journal.write(replace(an_instance(state), pid=7))
    host = FakeHost("one")
    host.frozen = frozen
    world.hosts.found = [host]

    await world.instances.take_over()

    assert (world.instances.get("one").state, world.instances.get("one").pid) == (expected, host.pid)
    assert not host.released


async def test_an_instance_holds_its_weights_for_as_long_as_it_has_a_process(world: World) -> None:
    await world.started()
    assert world.weights.held == {"one": FILES}
    assert world.instances.get("one").weight_files == FILES

    await world.instances.stop("one")
    assert world.weights.held == {}


async def test_weights_are_let_go_when_a_start_fails_and_when_a_process_dies(world: World) -> None:
    world.hosts.host.failing = {"load"}
    world.instances.admit(an_instance(State.STARTING))
    with pytest.raises(Aborted):
        await world.instances.start("one", MODEL)
    assert world.weights.held == {}

    world.hosts.host.failing = set()
    host = await world.started()
    async with world.instances.changes() as changes:
        host.lost.set()
        while (change := await changes.get()).instance is None or change.instance.state is not State.FAILED:
            pass
    await world.instances.stop("one")
    assert world.weights.held == {}


async def test_an_instance_taken_over_holds_its_weights_again(world: World) -> None:
    world.instances.journal.write(replace(an_instance(State.SERVING), weight_files=FILES))
    world.hosts.found = [FakeHost("one")]

    await world.instances.take_over()

    assert world.weights.held == {"one": FILES}


async def test_weights_that_a_snapshot_is_to_carry_are_loaded_from_their_own_files(world: World) -> None:
    world.instances.admit(replace(an_instance(State.STARTING), weights=Weights.INCLUDED))

    instance = await world.instances.start("one", MODEL)

    assert world.weights.held == {}
    assert (instance.weights, instance.weights_digest) == (Weights.INCLUDED, "digest")


async def test_what_cannot_be_ended_does_not_keep_the_daemon_from_starting(world: World) -> None:
    world.instances.journal.write(an_instance(State.STOPPING))
    stubborn, stranger = FakeHost("one"), FakeHost("two")
    stubborn.failing = stranger.failing = {"release"}
    world.hosts.found = [stubborn, stranger]
    (world.directory / "instances" / "given-up").mkdir()

    await world.instances.take_over()

    assert world.instances.all() == []
    assert world.left() == []


async def test_an_instance_moves_on_when_the_journal_cannot_be_written(world: World) -> None:
    await world.started()
    world.instances.journal.directory = world.directory / "gone"

    assert (await world.instances.park("one")).state is State.PARKED

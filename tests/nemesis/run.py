"""One run: a quiet beginning, the faults while clients ask, a quiet end, and the look at what is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dumont.client import AsyncClient
from tests.nemesis import audit
from tests.nemesis.clients import PROMPTS, SCRATCH, Caller, Operator, Tally, keep_trying
from tests.nemesis.fleet import Fleet, until
from tests.nemesis.plan import ANY, Fault

DEPLOYMENTS: Final = ("shared", "local")
CALLERS: Final = 3
START_SECONDS: Final = 60.0
# After the last fault everything must be well again within this time.
HEAL_SECONDS: Final = 60.0
# A phase that does not come is waited for no longer: the fault is left out.
PHASE_SECONDS: Final = 10.0


@dataclass
class Report:
    """What was done and what came of it."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    tally: Tally = field(default_factory=Tally)
    # Kept for somebody to decide about: what a controller that was killed had not written down.
    orphans: int = 0
    leaks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def survived(self) -> bool:
        return not self.tally.problems and not self.leaks

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "tally": vars(self.tally), "survived": self.survived()}


async def run(
    fleet: Fleet, model: Path, seed: int, faults: Sequence[Fault], seconds: float, say: Callable[[str], None]
) -> Report:
    """Carry out the faults and report.

    Args:
        model: directory of the model that is served.
        seconds: no fault begins later than this after the first.
        say: told what happens, a line each.
    """
    report = Report(seed)
    began = time.monotonic()
    try:
        await fleet.start()
        await _begin(fleet, model)
        await _disturb(fleet, model, faults, seconds, report, say)
        say("no more faults")
        await _heal(fleet, report)
        await _empty(fleet, report)
    finally:
        await fleet.close()
        report.seconds = time.monotonic() - began
    return report


async def _begin(fleet: Fleet, model: Path) -> None:
    """Everything serves, and each deployment has a snapshot or is about to."""

    async def nodes_are_ready() -> None:
        async with AsyncClient(fleet.controller) as client:
            ready = {
                node.name.removeprefix("nodes/")
                for node in await client.nodes.list()
                if node.state == "ready"
            }
        assert ready == set(fleet.node_names), ready

    problem = await keep_trying(nodes_are_ready, START_SECONDS)
    if problem:
        raise RuntimeError(f"the fleet did not start: {problem}; its logs are in {fleet.root}/logs")
    fleet.trust()
    async with AsyncClient(fleet.controller) as client:
        for name in DEPLOYMENTS:
            await client.deploy(
                str(model),
                name=name,
                checkpoint={"storage": "s3"} if name == "shared" else {"weights": "included"},
                idle_timeout=0.7,
                park_timeout=1.0,
            )


async def _disturb(
    fleet: Fleet,
    model: Path,
    faults: Sequence[Fault],
    seconds: float,
    report: Report,
    say: Callable[[str], None],
) -> None:
    seed = report.seed
    stop = asyncio.Event()
    right: dict[str, str] = {}
    callers = [Caller(fleet.controller, seed + number, report.tally, right) for number in range(CALLERS)]
    # What is right is what a fleet in good health answers.
    for prompt in PROMPTS:
        await callers[0].ask(DEPLOYMENTS[0], prompt)
    if report.tally.problems:
        raise RuntimeError(f"nothing is answered before the first fault: {report.tally.problems[0]}")
    operator = Operator(fleet.controller, seed, report.tally, str(model))
    async with asyncio.TaskGroup() as tasks:
        for caller in callers:
            tasks.create_task(caller.run(list(DEPLOYMENTS), stop))
        tasks.create_task(operator.run(list(DEPLOYMENTS), stop))
        last = time.monotonic() + seconds
        for number, fault in enumerate(faults):
            await asyncio.sleep(fault.pause)
            if time.monotonic() > last:
                report.left_out += len(faults) - number
                break
            if fault.phase == ANY:
                await _inflict(fleet, fault, report, say)
                continue
            provoking = tasks.create_task(operator.provoke(fault.phase, list(DEPLOYMENTS)))
            await _inflict(fleet, fault, report, say)
            provoking.cancel()
        stop.set()
    if operator.scratch is not None:
        there = await _deployments(fleet)
        if (SCRATCH in there) is not operator.scratch:
            report.tally.problems.append(
                f"deployments/{SCRATCH} was acknowledged as {'made' if operator.scratch else 'deleted'}, "
                f"and now there are {sorted(there)}"
            )


async def _inflict(fleet: Fleet, fault: Fault, report: Report, say: Callable[[str], None]) -> None:
    found: list[dict[str, int]] = []

    def victims_there() -> bool:
        victims = fleet.find(fault.victims, fault.phase)
        if victims:
            found[:] = [victims]
        return bool(victims)

    if not await until(victims_there, PHASE_SECONDS):
        report.left_out += 1
        say(f"left out, for there was no such moment: {fault}")
        return
    # A process of a phase may be gone after the delay, and then the next of its kind is hit.
    await asyncio.sleep(fault.delay)
    victims_there()
    pids = found[0].values()
    report.faults[str(fault)] += 1
    say(f"{fault}: {', '.join(f'{name} {pid}' for name, pid in found[0].items())}")
    with contextlib.suppress(ProcessLookupError):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP if fault.stopped else signal.SIGKILL)
    if fault.stopped:
        await asyncio.sleep(fault.stopped)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def _deployments(fleet: Fleet) -> set[str]:
    there: set[str] = set()

    async def ask() -> None:
        async with AsyncClient(fleet.controller) as client:
            there.update(item.name.removeprefix("deployments/") for item in await client.deployments.list())

    if problem := await keep_trying(ask, HEAL_SECONDS):
        raise RuntimeError(f"the controller did not come back: {problem}")
    return there


async def _heal(fleet: Fleet, report: Report) -> None:
    """Everything answers again by itself, and nothing hangs in between."""
    caller = Caller(fleet.controller, report.seed, report.tally, {})
    for name in DEPLOYMENTS:
        await caller.ask(name, PROMPTS[0])

    async def settled() -> None:
        async with AsyncClient(fleet.controller) as client:
            nodes = {node.name: node.state for node in await client.nodes.list()}
            assert set(nodes.values()) == {"ready"}, nodes
            states = {item.name: item.info.state for item in await client.deployments.list()}
            assert set(states.values()) == {"active"}, states
            moving = {
                instance.name: instance.state
                for instance in await client.instances.list()
                if instance.state not in ("serving", "parked", "failed")
            }
            assert not moving, moving

    if problem := await keep_trying(settled, HEAL_SECONDS):
        report.tally.problems.append(f"not well again {HEAL_SECONDS:.0f} s after the last fault: {problem}")


async def _empty(fleet: Fleet, report: Report) -> None:
    """Delete everything, end everything, and look at what is left."""

    async def delete() -> None:
        async with AsyncClient(fleet.controller) as client:
            for item in await client.deployments.list():
                await client.deployments.delete(item.name)
            assert not await client.deployments.list()
            # Kept until somebody says so, which is as it should be; but few.
            for orphan in await client.snapshots.list(orphans=True):
                await client.snapshots.delete(orphan.name)
                report.orphans += 1
            for instance in await client.instances.list():
                if instance.orphan:
                    await client.instances.stop(instance.name)
                    report.orphans += 1
            left = [instance.name for instance in await client.instances.list()]
            left += [snapshot.name for snapshot in await client.snapshots.list()]
            assert not left, left
            await client.snapshots.prune()

    if problem := await keep_trying(delete, HEAL_SECONDS):
        report.leaks.append(f"not deleted: {problem}")
    objects = await asyncio.to_thread(audit.in_bucket, fleet)
    statuses = await fleet.terminate("store")
    for name, status in statuses.items():
        if status != 0:
            how = "did not end when it was asked to" if status is None else f"ended with status {status}"
            report.tally.problems.append(f"{name} {how}")
    report.leaks += [*audit.on_machine(fleet), *audit.in_nodes(fleet), *objects]

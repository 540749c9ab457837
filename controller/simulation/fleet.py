"""Run the controller over simulated nodes while the requests of a trace arrive."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import structlog

from controller import policy
from controller.assembly import Controller, assemble
from controller.identity import Established, Identity
from controller.metrics import Metrics
from controller.model import Checkpoint, Deployment, NodeState, StartInfo, StartMode, Storage
from controller.ports import Members, Nodes, Registry, Stored
from controller.serving import Request
from controller.simulation.figures import Machine, Model
from controller.simulation.nodes import SimulatedNodes
from controller.simulation.results import Result, Tally
from controller.simulation.trace import Arrival, Trace
from controller.simulation.virtual import BEGIN, VirtualClock, VirtualLoop
from dumont import names
from dumont.errors import DumontError

HEARTBEAT: Final = 30.0
ENGINE: Final = "causal_lm"
# Callers give up after so long.
PATIENCE: Final = 60.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """The nodes, and the timers of every deployment in seconds."""

    nodes: int
    gpus: int
    idle_timeout: float
    park_timeout: float
    seed: int


class _NoRegistry:
    """Stores nothing: what a simulation has recorded ends with it."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    async def load(self) -> Stored:
        return self._stored

    async def claim(self) -> frozenset[str]:
        return frozenset()

    async def members(self) -> Members:
        return self._stored.members

    def __getattr__(self, name: str) -> Any:
        async def stored(*arguments: object) -> None:
            return None

        return stored


class _Answer:
    """Notes when the first token came, and from which tier."""

    def __init__(self, tally: Tally, arrived: float) -> None:
        self._tally = tally
        self._arrived = arrived

    def hold(self, give_back: Callable[[], None]) -> None:
        return None

    async def start(self, info: StartInfo) -> None:
        seconds = asyncio.get_running_loop().time() - self._arrived
        self._tally.answered(info.tier.value, seconds)

    async def frame(self, frame: bytes) -> None:
        return None


def run(trace: Trace, fleet: Fleet, machine: Machine, name: str = "Dumont") -> Result:
    """Simulate the whole trace; the same arguments give the same result, but for the times of decisions.

    Args:
        trace: the requests.
        fleet: the nodes and timers.
        machine: what each node is like.
        name: of the policy in the result.
    """
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    before = structlog.get_config()["wrapper_class"]
    structlog.configure(wrapper_class=quiet)
    gc.collect()
    gc.freeze()
    try:
        with _counted_ids(), asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(_run(trace, fleet, machine, name))
    finally:
        gc.unfreeze()
        structlog.configure(wrapper_class=before)


async def _run(trace: Trace, fleet: Fleet, machine: Machine, name: str) -> Result:
    ids = [f"d{number:05}" for number in range(len(trace.models))]
    nodes = SimulatedNodes(
        machine, fleet.nodes, fleet.gpus, dict(zip(ids, trace.models, strict=True)), fleet.seed
    )
    deployments = tuple(_deployment(i, m, fleet) for i, m in zip(ids, trace.models, strict=True))
    stored = Stored(
        deployments=deployments,
        nodes=tuple(nodes.facts(node) for node in nodes.nodes.values()),
        captured=nodes.captured({deployment.id: deployment.uid for deployment in deployments}),
        last_use={deployment.id: BEGIN for deployment in deployments},
    )
    controller = await assemble(
        cast(Nodes, nodes),
        cast(Registry, _NoRegistry(stored)),
        VirtualClock(),
        Established(Identity("simulation", 1)),
        HEARTBEAT,
    )
    inventory = controller.core.inventory
    await inventory.until(lambda: all(n.state is NodeState.READY for n in inventory.nodes.values()))
    tally = Tally()
    with _timed_decisions() as decisions:
        began = time.process_time()
        beating = asyncio.create_task(_beat(controller, nodes))
        await _ask_all(controller, trace.arrivals, ids, tally)
        elapsed = time.process_time() - began
    nodes.settle()
    beating.cancel()
    made = _decisions(controller.core.metrics)
    await controller.close()
    hours = nodes.byte_seconds / machine.gpu_bytes / 3600
    return tally.result(name, hours, made / elapsed, decisions)


def _deployment(identifier: str, model: Model, fleet: Fleet) -> Deployment:
    return Deployment(
        id=identifier,
        uid=f"uid of {identifier}",
        model=model.name,
        engine=ENGINE,
        start_mode=StartMode.CHECKPOINT,
        checkpoint=Checkpoint(True, ttl=30 * 86400.0, storage=Storage.S3),
        idle_timeout=fleet.idle_timeout,
        park_timeout=fleet.park_timeout,
        create_time=BEGIN,
        update_time=BEGIN,
        etag="e",
        weights_bytes=model.weights_bytes,
    )


async def _beat(controller: Controller, nodes: SimulatedNodes) -> None:
    """The nodes' heartbeats, spread over the interval."""
    while True:
        for node in nodes.nodes.values():
            controller.core.fleet.heartbeat(node.id, 0, gpus=nodes.gpus(node))
            await asyncio.sleep(HEARTBEAT / len(nodes.nodes))


async def _ask_all(
    controller: Controller, arrivals: tuple[Arrival, ...], ids: list[str], tally: Tally
) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    asking: set[asyncio.Task[None]] = set()
    for arrival in arrivals:
        wait = began + arrival.at - loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(_ask(controller, ids[arrival.deployment], arrival.tokens, tally))
        asking.add(task)
        task.add_done_callback(asking.discard)
    if asking:
        await asyncio.wait(asking)


async def _ask(controller: Controller, deployment: str, tokens: int, tally: Tally) -> None:
    request = Request(deployment, {ENGINE}, lambda instance: f"{instance} {tokens}".encode(), PATIENCE)
    try:
        await controller.serving.generate(request, _Answer(tally, asyncio.get_running_loop().time()))
    except DumontError as error:
        tally.failures[error.reason] += 1


@contextmanager
def _counted_ids() -> Iterator[None]:
    """Ids by number while the context lasts: random ones would break ties in another way in each run."""
    number = itertools.count()
    random_id = names.new_id
    names.new_id = lambda prefix: f"{prefix}-{next(number):012x}"
    try:
        yield
    finally:
        names.new_id = random_id


@contextmanager
def _timed_decisions() -> Iterator[list[float]]:
    """The processor seconds that each decision about a start takes while the context lasts."""
    seconds: list[float] = []
    decide = policy.decide

    def timed(facts: policy.Facts, now: float) -> policy.Attempt | policy.Wait:
        began = time.process_time()
        try:
            return decide(facts, now)
        finally:
            seconds.append(time.process_time() - began)

    policy.decide = timed
    try:
        yield seconds
    finally:
        policy.decide = decide


def _decisions(metrics: Metrics) -> float:
    """Requests admitted, starts decided and actions of the reconciler."""
    return sum(
        sample.value
        for counter in (metrics.requests, metrics.starts, metrics.actions)
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )

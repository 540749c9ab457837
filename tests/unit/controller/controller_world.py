"""A controller over ports in memory, on a clock that stands still, for every test of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from controller.assembly import Controller, assemble
from controller.deployments import Draft
from controller.identity import Established, Identity
from controller.inventory import Inventory
from controller.model import Deployment, Gpu, InstanceState, Node, NodeState, StartInfo, StartMode
from controller.serving import Request
from dumont.engines import GENERATES
from tests.fakes.manual_clock import ManualClock
from tests.fakes.memory_nodes import MemoryNodes
from tests.fakes.memory_registry import MemoryRegistry


class Answered:
    """An answer as its caller got it."""

    def __init__(self) -> None:
        self.starts: list[StartInfo] = []
        self.frames: list[bytes] = []

    def hold(self, give_back: Callable[[], None]) -> None:
        self.give_back = give_back

    async def start(self, info: StartInfo) -> None:
        self.starts.append(info)

    async def frame(self, frame: bytes) -> None:
        assert self.starts, "a frame came before the start was told"
        self.frames.append(frame)


class World:
    """Nodes, a registry and a clock that outlive the controllers in them."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.nodes = MemoryNodes(self.clock)
        self.registry = MemoryRegistry()
        self.who = Established(Identity("controller", 1))
        self.controller: Controller

    async def boot(self, **settings: Any) -> None:
        who = await self.registry.join(self.next_start, "controller:7070", 10.0)
        self.controller = await assemble(self.nodes, self.registry, self.clock, who, **settings)

    def next_start(self, stored: Identity | None, empty: bool) -> Established:
        starts = stored.starts + 1 if stored is not None else self.who.identity.starts
        return replace(self.who, identity=replace(self.who.identity, starts=starts))

    async def crash(self) -> None:
        """The controller dies without a word; what it began on nodes goes on."""
        self.nodes.abandoned = True
        await self.controller.core.tasks.close()
        self.nodes.abandoned = False
        self.nodes.release_all()

    async def node(
        self,
        identifier: str = "n1",
        *,
        capable: bool = True,
        memory: int = 1 << 30,
        object_store: str = "",
        gpus: Mapping[str, int] | None = None,
        **known: Any,
    ) -> None:
        made = self.nodes.add_node(identifier)
        made.store, made.gpus = bool(object_store), dict(gpus or {})
        facts = Node(
            identifier,
            f"{identifier}:7071",
            checkpoint_capable=capable,
            memory_available_bytes=memory,
            object_store=object_store,
            gpus=tuple(Gpu(uuid, "H", total, total) for uuid, total in made.gpus.items()),
            **known,
        )
        await self.controller.core.fleet.register(facts)
        await self.until(lambda: self.inventory.nodes[identifier].state is NodeState.READY)

    async def deploy(
        self,
        mode: StartMode = StartMode.CHECKPOINT,
        identifier: str = "qa",
        engine: str = "",
        model: str = "org/model",
        **settings: Any,
    ) -> Deployment:
        draft = Draft(model=model, engine=engine, start_mode=mode, **settings)
        return await self.controller.core.deployments.create(identifier, draft, "")

    async def ask(
        self,
        deployment: str = "qa",
        timeout: float | None = None,
        sequences: int = 1,
        answer: Answered | None = None,
    ) -> tuple[StartInfo, list[bytes]]:
        answer = answer or Answered()
        await self.controller.serving.generate(
            Request(deployment, GENERATES, str.encode, timeout, sequences), answer
        )
        (info,) = answer.starts
        return info, answer.frames

    async def advance(self, seconds: float) -> None:
        """Time passes while every node keeps sending heartbeats."""
        end = self.clock.moment().monotonic + seconds
        while (left := end - self.clock.moment().monotonic) > 0:
            for identifier, node in self.nodes.world.items():
                if node.up and identifier in self.inventory.nodes:
                    self.controller.core.fleet.heartbeat(identifier, 0)
            self.clock.advance(min(left, max(5.0, seconds / 20)) if left > 5.0 else left)
            for identifier, node in self.nodes.world.items():
                if node.up and identifier in self.inventory.nodes:
                    self.controller.core.fleet.heartbeat(identifier, 0)
            await self.settle()

    async def settle(self) -> None:
        """Let everything that can run without time passing run."""
        for _ in range(60):
            await asyncio.sleep(0)

    async def until(self, predicate: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            await self.inventory.until(predicate)

    @property
    def inventory(self) -> Inventory:
        return self.controller.core.inventory

    def states(self, deployment: str = "qa") -> list[InstanceState]:
        return [instance.state for instance in self.inventory.instances_of(deployment)]

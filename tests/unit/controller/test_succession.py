"""One controller takes another one's place, whatever happens to it in the middle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controller.assembly import Controller, assemble
from controller.deployments import Draft
from controller.identity import Established, Identity
from controller.model import Node, NodeState, StartMode
from controller.ports import Members, Stored
from dumont.errors import DumontError, Unavailable
from tests.fakes.manual_clock import ManualClock
from tests.fakes.memory_nodes import MemoryNodes
from tests.fakes.memory_registry import MemoryDatabase, MemoryRegistry

LEASE = 10.0


class Registry(MemoryRegistry):
    """One whose ``load`` can be kept waiting, or fail, and whose ``members`` can."""

    def __init__(self, database: MemoryDatabase) -> None:
        super().__init__(database)
        self.answers = asyncio.Event()
        self.answers.set()
        self.error: DumontError | None = None
        # Of the next calls of ``members``.
        self.errors: list[DumontError | None] = []

    async def members(self) -> Members:
        if self.errors and (error := self.errors.pop(0)) is not None:
            # Another controller changes something meanwhile.
            self.database.revision += 1
            raise error
        return await super().members()

    async def load(self) -> Stored:
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return await super().load()


class Pair:
    """Two controllers on one database; the first one holds ``deployments/qa``."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.nodes = MemoryNodes(self.clock)
        self.database = MemoryDatabase(self.clock)
        self.registries: list[Registry] = []
        self.controllers: list[Controller] = []

    async def begin(self) -> None:
        self.nodes.add_node("n1")
        for number in (0, 1):
            registry = Registry(self.database)
            who = await registry.join(self._next, f"controller-{number}", LEASE)
            self.registries.append(registry)
            self.controllers.append(await assemble(self.nodes, registry, self.clock, who, lease=LEASE))

    def _next(self, stored: Identity | None, empty: bool) -> Established:
        return Established(Identity("fleet", (stored.starts if stored else 0) + 1))

    async def end(self) -> None:
        for controller in self.controllers:
            await controller.core.tasks.close()


@pytest.fixture
async def pair() -> Any:
    pair = Pair()
    await pair.begin()
    yield pair
    await pair.end()


async def ready(controller: Controller) -> None:
    nodes = controller.core.inventory.nodes
    await controller.core.fleet.register(Node("n1", "n1:7071"))
    await controller.core.inventory.until(lambda: nodes["n1"].state is NodeState.READY)


async def deployed(pair: Pair) -> None:
    first, second = pair.controllers
    await ready(first)
    await first.core.deployments.create("qa", Draft("org/model", "", StartMode.CHECKPOINT), "")
    await second.succession.refresh()
    assert not second.core.membership.mine("qa")
    # The first one is gone, and its session has ended.
    await pair.registries[0].leave()


async def test_a_caller_that_leaves_does_not_lose_what_was_claimed(pair: Pair) -> None:
    await deployed(pair)
    second = pair.controllers[1]
    pair.registries[1].answers.clear()
    caller = asyncio.create_task(second.succession.refresh())
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    caller.cancel()
    await asyncio.wait([caller])
    pair.registries[1].answers.set()
    await second.succession.refresh()

    assert second.core.membership.mine("qa")
    assert "qa" in second.core.deployments.by_id


async def test_a_database_that_fails_in_the_middle_does_not_lose_what_was_claimed(pair: Pair) -> None:
    await deployed(pair)
    second = pair.controllers[1]
    pair.registries[1].error = Unavailable("DATABASE_UNAVAILABLE", "the connection is gone")
    with pytest.raises(Unavailable):
        await second.succession.refresh()

    pair.registries[1].error = None
    await second.succession.refresh()

    assert second.core.membership.mine("qa")
    assert "qa" in second.core.deployments.by_id


async def test_whoever_becomes_the_oldest_asks_the_nodes_what_the_other_one_left(pair: Pair) -> None:
    second = pair.controllers[1]
    for one in pair.controllers:
        await ready(one)
    await second.succession.refresh()
    # It held no deployment, but perhaps it has begun something for one that was deleted meanwhile.
    await pair.registries[0].leave()

    await second.succession.refresh()

    assert second.core.membership.oldest
    assert second.core.inventory.nodes["n1"].state is NodeState.CONNECTING


async def test_a_controller_whose_session_has_ended_can_end_though_it_has_something_to_store(
    pair: Pair,
) -> None:
    await deployed(pair)
    first = pair.controllers[0]
    first.core.deployments.used("qa")

    await first.close()

    assert pair.database.last_use == {}


async def test_a_request_repeated_at_another_controller_does_not_make_that_one_the_holder(pair: Pair) -> None:
    first, second = pair.controllers
    for controller in pair.controllers:
        await ready(controller)
    draft = Draft("org/model", "", StartMode.CHECKPOINT)
    made = await second.core.deployments.create("qa", draft, "request-1")

    again = await first.core.deployments.create("qa", draft, "request-1")
    await first.succession.refresh()

    assert again == made
    assert first.core.membership.holder("qa") == second.core.membership.number
    assert second.core.membership.mine("qa")


async def test_a_refresh_that_fails_does_not_count_for_those_who_wait_for_it(pair: Pair) -> None:
    await deployed(pair)
    second = pair.controllers[1]
    registry = pair.registries[1]
    registry.answers.clear()
    running = asyncio.create_task(second.succession.refresh())
    await asyncio.sleep(0)
    fails, waits = (asyncio.create_task(second.succession.refresh()) for _ in range(2))
    await asyncio.sleep(0)
    registry.errors = [None, Unavailable("DATABASE_UNAVAILABLE", "the connection is gone")]

    registry.answers.set()
    outcomes = await asyncio.gather(running, fails, waits, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [type(None), Unavailable, type(None)]
    assert second.core.membership.members.revision == pair.database.revision

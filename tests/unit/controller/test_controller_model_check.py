"""Any order of requests, faults, crashes and time: nothing is started twice, lost or left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.model import InstanceState, NodeState, StartMode
from dumont.errors import AlreadyExists, DataLoss, DumontError, Internal, Unavailable
from tests.unit.controller.controller_world import World

FAULTS = {
    "refused": Internal("BROKEN", "it broke"),
    "damaged": DataLoss("CANARY_MISMATCH", "other tokens"),
    "silent": Unavailable("NODE_UNAVAILABLE", "no answer"),
    "dead": Unavailable("HOST_LOST", "the process ended"),
}
METHODS = ("start", "restore", "capture", "park", "resume", "stop", "generate", "frame 0", "delete_snapshot")
IDS = st.sampled_from(["a", "b"])


T = TypeVar("T")


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.world = World()
        self.asked: list[asyncio.Task[object]] = []
        self.modes: dict[str, StartMode] = {}
        self.run(self.begin())

    def run(self, work: Awaitable[T]) -> T:
        async def settled() -> T:
            result = await work
            await self.world.settle()
            return result

        return self.runner.run(settled())

    async def begin(self) -> None:
        await self.world.boot()
        await self.world.node()

    @rule(
        identifier=IDS,
        mode=st.sampled_from([StartMode.CHECKPOINT, *StartMode]),
        idle=st.sampled_from([None, 0.0, 20.0]),
    )
    def create(self, identifier: str, mode: StartMode, idle: float | None) -> None:
        async def work() -> None:
            # Refused where the id is taken or no node answers.
            with contextlib.suppress(AlreadyExists, Unavailable):
                await self.world.deploy(mode, identifier, idle_timeout=idle)

        self.run(work())

    @rule(identifier=IDS)
    def ask(self, identifier: str) -> None:
        async def work() -> None:
            self.asked.append(asyncio.create_task(self.world.ask(identifier)))

        self.run(work())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.asked))

        async def work() -> None:
            task.cancel()

        self.run(work())

    @rule(method=st.sampled_from(METHODS), fault=st.sampled_from(sorted(FAULTS)))
    def fail(self, method: str, fault: str) -> None:
        self.world.nodes.fail(method, FAULTS[fault])

    @rule(method=st.sampled_from(["start", "restore", "capture", "frame 0"]))
    def hold(self, method: str) -> None:
        self.world.nodes.hold(method)

    @rule()
    def release(self) -> None:
        async def work() -> None:
            self.world.nodes.release_all()
            self.world.nodes.finish_starts("n1")

        self.run(work())

    @rule(seconds=st.sampled_from([1.0, 40.0, 301.0, 1000.0, 90_000.0]))
    def advance(self, seconds: float) -> None:
        self.run(self.world.advance(seconds))

    @precondition(lambda self: self.world.nodes.world["n1"].instances)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(sorted(self.world.nodes.world["n1"].instances)))

        async def work() -> None:
            self.world.nodes.lose("n1", victim)

        self.run(work())

    @rule()
    def cut(self) -> None:
        async def work() -> None:
            self.world.nodes.cut("n1")

        self.run(work())

    @rule()
    def reconnect(self) -> None:
        async def work() -> None:
            self.world.nodes.restore_contact("n1")

        self.run(work())

    @rule()
    def crash(self) -> None:
        async def work() -> None:
            for task in self.asked:
                task.cancel()
            await self.world.crash()
            await self.world.boot()

        self.run(work())

    @rule(identifier=IDS)
    def delete(self, identifier: str) -> None:
        self.run(self.remove(identifier))

    async def remove(self, identifier: str) -> None:
        if identifier in self.world.controller.core.deployments.by_id:
            await self.world.controller.core.deployments.begin_delete(identifier)
            await self.world.controller.starts.cancel(identifier)

    @precondition(lambda self: self.world.inventory.instances)
    @rule(data=st.data(), command=st.sampled_from(["park", "resume", "stop"]))
    def command(self, data: st.DataObject, command: str) -> None:
        target = data.draw(st.sampled_from(sorted(self.world.inventory.instances)))

        async def work() -> None:
            call = getattr(self.world.controller.instances, command)
            self.asked.append(asyncio.create_task(call(target)))

        self.run(work())

    @rule(identifier=IDS)
    def snapshot(self, identifier: str) -> None:
        async def work() -> None:
            wanted = f"s{len(self.asked)}"
            self.asked.append(
                asyncio.create_task(self.world.controller.starts.capture(identifier, wanted, lambda *_: None))
            )

        self.run(work())

    @invariant()
    def nothing_is_started_twice(self) -> None:
        starting = Counter(
            report.deployment
            for report in self.world.nodes.world["n1"].instances.values()
            if report.state is InstanceState.STARTING
        )
        assert all(count == 1 for count in starting.values()), starting

    @invariant()
    def no_prompt_was_ever_captured(self) -> None:
        assert self.world.nodes.spoiled == []

    @invariant()
    def nothing_is_negative(self) -> None:
        assert all(i.in_flight >= 0 for i in self.world.inventory.instances.values())

    def teardown(self) -> None:
        self.run(self.finish())
        self.runner.close()

    async def finish(self) -> None:
        world = self.world
        world.nodes.forgive()
        world.nodes.release_all()
        world.nodes.restore_contact("n1")
        for _ in range(4):
            world.nodes.finish_starts("n1")
            await world.advance(20)
        assert world.inventory.nodes["n1"].state is NodeState.READY
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*self.asked, return_exceptions=True)
        for answer in answers:
            good = not isinstance(answer, BaseException)
            assert good or isinstance(answer, DumontError | asyncio.CancelledError), answer
        assert [i.in_flight for i in world.inventory.instances.values() if i.in_flight] == []
        assert set(world.inventory.instances) == set(world.nodes.world["n1"].instances)
        for identifier in list(world.controller.core.deployments.by_id):
            await self.remove(identifier)
        for _ in range(10):
            await world.advance(61)
        assert world.controller.core.deployments.by_id == {}
        assert world.nodes.world["n1"].instances == {}
        assert world.nodes.world["n1"].snapshots == {}
        assert (await world.registry.load()).intents == ()
        await world.controller.close()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

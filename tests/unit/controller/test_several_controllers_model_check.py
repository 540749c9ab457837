"""Two controllers and three nodes on one database, in any order of requests, stops, deaths and time.

The controllers are the real ones. Their nodes, their database and their clock are in memory. A controller
that is stopped goes on later with what it was about to send, as after SIGSTOP and SIGCONT.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.assembly import Controller, assemble
from controller.deployments import Draft
from controller.identity import Established, Identity
from controller.membership import Membership
from controller.model import Gpu, InstanceState, Moment, Node, NodeState, Report, Snapshot, StartMode
from controller.ports import Nodes, Registry
from controller.serving import Request
from dumont.errors import DumontError, NotFound, Unavailable
from tests.fakes.manual_clock import ManualClock
from tests.fakes.memory_nodes import MemoryNodes
from tests.fakes.memory_registry import MemoryDatabase, MemoryRegistry
from tests.fakes.reachable_nodes import Fences, ReachableNodes
from tests.unit.controller.controller_world import GENERATES, Answered

LEASE = 10.0
# A third of the lease, and a fifth of the silence after which a node is given up.
TICK = 3.0
NAMES = ("a", "b")
NODES = ("n1", "n2", "n3")
GPU = 200
SIZES = {"a": (100, 10), "b": (150, 10)}
# Of somebody else, from the beginning.
FOREIGN_INSTANCE = Report("foreign-1", "foreign", InstanceState.SERVING)
FOREIGN_SNAPSHOT = Snapshot("foreign-s", "a", "n1", 1.0, manifest_digest="?")
COMMANDS = frozenset(
    {"start", "restore", "capture", "park", "resume", "stop", "move", "delete_snapshot", "publish"}
)
CONTROLLERS = st.sampled_from([0, 1])
T = TypeVar("T")


class Stoppable:
    """A registry whose calls wait while its controller is stopped, and fail when it is dead."""

    def __init__(self, registry: MemoryRegistry, reach: ReachableNodes) -> None:
        self._registry = registry
        self._reach = reach

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._registry, name)

        async def call(*arguments: Any) -> Any:
            await self._run()
            answer = await method(*arguments)
            await self._run()
            return answer

        return call

    async def _run(self) -> None:
        await self._reach.running.wait()
        if self._reach.dead:
            raise Unavailable("DATABASE_UNAVAILABLE", "the connection is gone")


class StoppableClock:
    """A clock whose sleepers wake only while their controller runs."""

    def __init__(self, clock: ManualClock, reach: ReachableNodes) -> None:
        self._clock = clock
        self._reach = reach

    def moment(self) -> Moment:
        return self._clock.moment()

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        await self._reach.running.wait()


class One:
    """A controller that lives, or is stopped."""

    def __init__(self, controller: Controller, reach: ReachableNodes) -> None:
        self.controller = controller
        self.reach = reach
        self.requests: list[asyncio.Task[Any]] = []

    @property
    def stopped(self) -> bool:
        return not self.reach.running.is_set()

    @property
    def membership(self) -> Membership:
        return self.controller.core.membership


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.nodes = MemoryNodes(self.clock)
        self.nodes.sizes = dict(SIZES)
        self.database = MemoryDatabase(self.clock)
        self.fences = Fences()
        self.ones: list[One | None] = [None, None]
        self.asked: list[asyncio.Task[object]] = []
        # The turn among the holders of a deployment whose command a node carried out last.
        self.turns: dict[tuple[str, str], int] = {}
        self.late: list[str] = []
        self.run(self.begin())

    # The world

    def run(self, work: Awaitable[T]) -> T:
        async def settled() -> T:
            result = await work
            await self.settle()
            return result

        return self.runner.run(settled())

    async def settle(self) -> None:
        for _ in range(2):
            for _ in range(40):
                await asyncio.sleep(0)
            for number, one in enumerate(self.ones):
                if one is not None and one.membership.ended.is_set() and not one.stopped:
                    # As main does: it begins again as a new process would.
                    await self.end(number)
                    await self.start(number)

    async def begin(self) -> None:
        for name in NODES:
            made = self.nodes.add_node(name)
            made.gpus = {f"GPU-{name}": GPU}
        self.nodes.world["n1"].instances[FOREIGN_INSTANCE.id] = FOREIGN_INSTANCE
        self.nodes.world["n1"].snapshots[FOREIGN_SNAPSHOT.id] = FOREIGN_SNAPSHOT
        for number in (0, 1):
            await self.start(number)
        await self.pass_time(TICK)

    async def start(self, number: int) -> None:
        registry = MemoryRegistry(self.database)

        def decide(stored: Identity | None, empty: bool) -> Established:
            return Established(Identity("fleet", (stored.starts if stored else 0) + 1))

        who = await registry.join(decide, f"controller-{number}", LEASE)
        membership = Membership(who.identity.starts)

        def carried_out(method: str, node: str, arguments: tuple[Any, ...]) -> None:
            self.look_at(membership.number, method, node, arguments)

        reach = ReachableNodes(self.nodes, self.fences, membership, carried_out)
        stoppable = cast(Registry, Stoppable(registry, reach))
        controller = await assemble(
            cast(Nodes, reach),
            stoppable,
            StoppableClock(self.clock, reach),
            who,
            lease=LEASE,
            membership=membership,
        )
        self.ones[number] = One(controller, reach)
        await self.beat(number)

    async def end(self, number: int) -> None:
        """A controller is gone without a word; what it began on nodes goes on."""
        one = self.ones[number]
        assert one is not None
        self.ones[number] = None
        one.reach.kill()
        self.nodes.abandoned = True
        await one.controller.core.tasks.close()
        for request in one.requests:
            request.cancel()
        await asyncio.gather(*one.requests, return_exceptions=True)
        self.nodes.abandoned = False

    async def beat(self, number: int) -> None:
        """Every node that is up says so to a controller."""
        one = self.ones[number]
        if one is None or one.stopped:
            return
        fleet = one.controller.core.fleet
        for name, node in self.nodes.world.items():
            if not node.up:
                continue
            try:
                fleet.heartbeat(name, 0)
            except NotFound:
                gpus = tuple(Gpu(uuid, "H", total, total) for uuid, total in node.gpus.items())
                facts = Node(
                    name, f"{name}:1", checkpoint_capable=True, gpus=gpus, memory_available_bytes=1 << 30
                )
                with contextlib.suppress(DumontError):
                    await fleet.register(facts)

    async def pass_time(self, seconds: float) -> None:
        end = self.clock.moment().monotonic + seconds
        while (left := end - self.clock.moment().monotonic) > 0:
            self.clock.advance(min(left, TICK))
            for number in (0, 1):
                await self.beat(number)
            await self.settle()

    def look_at(self, session: int, method: str, node: str, arguments: tuple[Any, ...]) -> None:
        """Write down a command that a node carries out although its sender was replaced."""
        if method not in COMMANDS:
            return
        deployment = arguments[1] if method in {"start", "restore"} else arguments[0].rpartition("-")[0]
        held = self.database.held.get(deployment, [])
        if session in held:
            turn = len(held) - 1 - held[::-1].index(session)
            if turn < self.turns.get((node, deployment), 0):
                self.late.append(f"{method} of session {session} on {node} after those of {held}")
            self.turns[node, deployment] = turn
        for one in self.ones:
            if one is None or one.membership.number == session or one.stopped:
                continue
            successor = one.membership
            ready = one.controller.core.inventory.nodes[node].state is NodeState.READY
            if ready and successor.sessions.ended(session) and successor.mine(deployment):
                self.late.append(f"{method} of session {session} on {node}, which answers {successor.number}")

    # Requests

    async def ask(self, via: int, deployment: str) -> object:
        """As the forwarding of requests does it: the holder answers, or whoever takes its place."""
        for _ in range(60):
            one = self.ones[via]
            if one is None:
                raise Unavailable("UNAVAILABLE", "connection refused")
            if one.membership.holder(deployment) is None:
                await one.controller.succession.refresh()
            holder = one.membership.holder(deployment)
            by = one if holder in (None, one.membership.number) else self.living(holder)
            if by is not None:
                task = asyncio.current_task()
                assert task is not None
                answering = asyncio.create_task(self.answer(by, deployment))
                by.requests.append(answering)
                try:
                    return await answering
                except asyncio.CancelledError:
                    if task.cancelling():
                        answering.cancel()
                        raise
                    # The controller died, and nothing of its answer had arrived.
            await self.clock.sleep(1.0)
            if self.ones[via] is one:
                await one.controller.succession.refresh()
        raise Unavailable("HOLDER_LOST", "nobody holds it")

    def living(self, session: int | None) -> One | None:
        return next((o for o in self.ones if o is not None and o.membership.number == session), None)

    async def answer(self, one: One, deployment: str) -> object:
        answer = Answered()
        await one.controller.serving.generate(Request(deployment, GENERATES, str.encode), answer)
        # Never two answers to one request.
        assert len(answer.starts) == 1
        assert answer.frames == self.nodes.frames
        return answer

    # Rules

    @rule(
        via=CONTROLLERS, name=st.sampled_from(NAMES), mode=st.sampled_from([StartMode.CHECKPOINT, *StartMode])
    )
    def create(self, via: int, name: str, mode: StartMode) -> None:
        one = self.ones[via]

        async def work() -> None:
            if one is not None and not one.stopped:
                draft = Draft(model="org/model", engine="", start_mode=mode, idle_timeout=20.0)
                self.spawn(one.controller.core.deployments.create(name, draft, ""), one)

        self.run(work())

    @rule(via=CONTROLLERS, name=st.sampled_from(NAMES))
    def request(self, via: int, name: str) -> None:
        async def work() -> None:
            self.asked.append(asyncio.create_task(self.ask(via, name)))

        self.run(work())

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        self.run(self.remove(name))

    async def remove(self, name: str) -> None:
        one = self.living(self.database.holders.get(name))
        if one is not None and not one.stopped and name in one.controller.core.deployments.by_id:
            self.spawn(one.controller.core.deployments.begin_delete(name), one)
            self.spawn(one.controller.starts.cancel(name), one)

    def spawn(self, work: Any, one: One) -> None:
        task = asyncio.ensure_future(work)
        one.requests.append(task)
        self.asked.append(task)

    @rule(number=CONTROLLERS)
    def kill(self, number: int) -> None:
        async def work() -> None:
            if self.ones[number] is not None:
                await self.end(number)

        self.run(work())

    @precondition(lambda self: None in self.ones)
    @rule()
    def restart(self) -> None:
        self.run(self.start(self.ones.index(None)))

    @rule(number=CONTROLLERS)
    def freeze(self, number: int) -> None:
        one = self.ones[number]
        if one is not None:
            one.reach.freeze()

    @rule(name=st.sampled_from(NAMES), turns=st.integers(0, 12), seconds=st.sampled_from([8.0, 20.0]))
    def stop_in_the_middle(self, name: str, turns: int, seconds: float) -> None:
        """A holder stops in the middle of what a request needs, perhaps until another one has its place."""

        async def work() -> None:
            one = self.living(self.database.holders.get(name))
            if one is None or one.stopped:
                return
            number = self.ones.index(one)
            self.asked.append(asyncio.create_task(self.ask(number, name)))
            for _ in range(turns):
                await asyncio.sleep(0)
            one.reach.freeze()
            await self.pass_time(seconds)
            self.asked.append(asyncio.create_task(self.ask(1 - number, name)))
            await self.settle()
            one.reach.thaw()

        self.run(work())

    @precondition(lambda self: any(one is not None and one.stopped for one in self.ones))
    @rule()
    def thaw(self) -> None:
        async def work() -> None:
            for one in self.ones:
                if one is not None:
                    one.reach.thaw()

        self.run(work())

    @rule(seconds=st.sampled_from([1.0, 4.0, 16.0, 45.0]))
    def wait(self, seconds: float) -> None:
        self.run(self.pass_time(seconds))

    @rule(node=st.sampled_from(NODES))
    def cut(self, node: str) -> None:
        async def work() -> None:
            self.nodes.cut(node)

        self.run(work())

    @rule(node=st.sampled_from(NODES), emptied=st.booleans())
    def come_back(self, node: str, emptied: bool) -> None:
        """A node answers again; ``emptied``: it has lost all that ran on it."""

        async def work() -> None:
            if self.nodes.world[node].up:
                return
            if emptied:
                for instance in [i for i in self.nodes.world[node].instances if i != FOREIGN_INSTANCE.id]:
                    self.nodes.lose(node, instance)
            self.nodes.restore_contact(node)
            self.nodes.finish_starts(node)

        self.run(work())

    @rule(method=st.sampled_from(["start", "restore", "capture"]))
    def hold(self, method: str) -> None:
        self.nodes.hold(method)

    @rule()
    def release(self) -> None:
        async def work() -> None:
            self.let_go()

        self.run(work())

    def let_go(self) -> None:
        self.nodes.release_all()
        for name in NODES:
            self.nodes.finish_starts(name)

    # What holds at any time

    @invariant()
    def no_gpu_is_overfull(self) -> None:
        for node in self.nodes.world.values():
            assert all(taken <= node.gpus[gpu] for gpu, taken in node.most_taken.items())

    @invariant()
    def nothing_is_carried_out_late(self) -> None:
        assert self.late == []

    @invariant()
    def no_prompt_was_ever_captured(self) -> None:
        assert self.nodes.spoiled == []

    @invariant()
    def what_is_not_known_is_kept(self) -> None:
        node = self.nodes.world["n1"]
        assert FOREIGN_INSTANCE.id in node.instances
        assert FOREIGN_SNAPSHOT.id in node.snapshots

    @invariant()
    def a_deployment_has_one_owner(self) -> None:
        """Of the controllers whose sessions live."""
        for name in self.database.deployments:
            owners = [
                one.membership.number
                for one in self.ones
                if one is not None
                and one.membership.number in self.database.sessions
                and one.membership.holder(name) == one.membership.number
            ]
            assert len(owners) <= 1, (name, owners)

    # What holds in the end

    def teardown(self) -> None:
        self.run(self.finish())
        self.runner.close()

    async def finish(self) -> None:
        self.nodes.forgive()
        for name in NODES:
            self.nodes.restore_contact(name)
        for number, one in enumerate(self.ones):
            if one is None:
                await self.start(number)
            else:
                one.reach.thaw()
        for _ in range(4):
            self.let_go()
            await self.pass_time(30.0)
        ones = [one for one in self.ones if one is not None]
        assert len(ones) == 2
        for one in ones:
            states = {n.state for n in one.controller.core.inventory.nodes.values()}
            assert states == {NodeState.READY}
        # Every request has ended, with an answer or with an error that says so.
        for outcome in await self.outcomes():
            good = not isinstance(outcome, BaseException)
            assert good or isinstance(outcome, DumontError | asyncio.CancelledError), outcome
        # No deployment is stuck: each controller answers for it.
        self.asked = [
            asyncio.create_task(self.ask(via, name))
            for name, deployment in self.database.deployments.items()
            if not deployment.deleting
            for via in (0, 1)
        ]
        await self.pass_time(30.0)
        for outcome in await self.outcomes():
            assert not isinstance(outcome, BaseException), outcome
        # And nothing is left over of what is deleted.
        for _ in range(3):
            for name in NAMES:
                await self.remove(name)
            await self.pass_time(61.0)
        assert self.database.deployments == {}
        for name, node in self.nodes.world.items():
            foreign = name == "n1"
            assert set(node.instances) == ({FOREIGN_INSTANCE.id} if foreign else set()), name
            assert set(node.snapshots) == ({FOREIGN_SNAPSHOT.id} if foreign else set()), name
        assert self.database.intents == {}
        assert self.database.captured == {}
        for one in self.ones:
            if one is not None:
                await one.controller.core.tasks.close()

    async def outcomes(self) -> list[object]:
        async with asyncio.timeout(5):
            return list(await asyncio.gather(*self.asked, return_exceptions=True))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    # What fails is long, and shorter only after many minutes.
    phases=(Phase.generate,),
)

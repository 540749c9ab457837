"""The only loop: whenever facts change or something falls due, make a plan and carry it out.

A step plans only the deployments and nodes that have changed or whose time has come.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, assert_never

import structlog

from controller import balance, expiry, room
from controller.backoff import Backoff
from controller.core import Core
from controller.expiry import (
    DeleteSnapshot,
    Evacuate,
    Forget,
    GiveUp,
    KeepWarm,
    Park,
    Publish,
    Rebalance,
    Stop,
)
from controller.instances import TRANSIENT, Instances
from controller.migration import Destination, Migrations
from controller.model import Moment, Node, NodeState
from controller.snapshots import Snapshots
from controller.starts.starts import Starts
from dumont.errors import DumontError

log = structlog.get_logger()

# An instance that served for so many seconds was stable: its next restart waits as briefly as the first.
STABLE_SECONDS = 60.0
# How many deployments and nodes one step plans; requests are served between two steps.
BATCH = 200
# Seconds after which a deployment is planned again in any case: the wall clock may have jumped.
LOOK_AGAIN = 3600.0
# Seconds after which a draining node is planned again: what could not leave may leave now.
DRAIN_AGAIN = 1.0
# Seconds between two moves for the balance of a node.
BALANCE_REST = 30.0


class Agenda:
    """When to plan which subject next. A later entry for a subject replaces an earlier one.

    A subject is ``deployments/ID`` or ``nodes/ID``.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._at: dict[str, float] = {}

    def put(self, subject: str, at: float) -> None:
        """Plan ``subject`` at monotonic time ``at``."""
        if self._at.get(subject) != at:
            self._at[subject] = at
            heapq.heappush(self._heap, (at, subject))

    def drop(self, subject: str) -> None:
        """Remove the subject's entry, if it has one."""
        self._at.pop(subject, None)

    def next_at(self) -> float | None:
        """The monotonic time at which the first subject is due; None if there is none."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float, limit: int) -> list[str]:
        """Remove and return at most ``limit`` subjects that are due at ``now``."""
        due: list[str] = []
        while len(due) < limit and (at := self.next_at()) is not None and at <= now:
            subject = heapq.heappop(self._heap)[1]
            del self._at[subject]
            due.append(subject)
        return due


class Reconciler:
    """Brings instances, snapshots and nodes to the state that their deployments ask for.

    Args:
        core: the ports and the facts.
        starts: where a deployment that must stay warm is started.
        instances: the commands to instances.
        snapshots: the commands to snapshots.
        migrations: what brings instances elsewhere.
        silence: seconds without a heartbeat after which a node is given up.
        save_every: seconds between two saves of last-use times; a crash loses at most that much.
        prune_every: seconds between two prunings of each object store; 0: never.
        rebalance: whether idle instances leave crowded GPUs.
    """

    def __init__(
        self,
        core: Core,
        starts: Starts,
        instances: Instances,
        snapshots: Snapshots,
        migrations: Migrations,
        silence: float = 15.0,
        save_every: float = 2.0,
        prune_every: float = 0.0,
        rebalance: bool = True,
    ) -> None:
        self._core = core
        self._starts = starts
        self._instances = instances
        self._snapshots = snapshots
        self._migrations = migrations
        self._silence = silence
        self._save_every = save_every
        self._prune_every = prune_every
        self._rebalance = rebalance
        # Targets of the actions under way; no target is acted on twice at the same time.
        self._under_way: dict[str, float] = {}
        self._agenda = Agenda()
        self._wake = asyncio.Event()
        self._backoff = Backoff(first=1.0, limit=60.0)
        self._restarts = Backoff(first=1.0, limit=60.0)
        self._defects = Backoff(first=1.0, limit=60.0)
        # After a move a node is left alone for a while, whether it succeeded or not.
        self._balanced = Backoff(first=BALANCE_REST, limit=BALANCE_REST)
        self._warmed: dict[str, float] = {}

    async def run(self) -> None:
        """Reconcile until cancelled."""
        self._core.tasks.spawn(self._save_last_use(), "save last use")
        if self._prune_every:
            self._core.tasks.spawn(self._prune_stores(), "prune object stores")
        self._core.inventory.on_change = self._wake.set
        for deployment in self._core.deployments.by_id:
            self._core.inventory.touch(f"deployments/{deployment}")
        while True:
            self._wake.clear()
            try:
                again_in = self.step()
            except Exception:
                self._failed("step")
                again_in = self._defects.at["step"] - self._core.now()
                await self._core.clock.sleep(again_in)
                continue
            self._defects.succeeded("step")
            await self._sleep(again_in)

    def step(self) -> float | None:
        """Plan what is due and begin it.

        Returns:
            Seconds until more may be due; None: only a change of facts can make it so.
        """
        now = self._core.clock.moment()
        for subject in self._core.inventory.take_changed():
            self._agenda.put(subject, max(now.monotonic, self._defects.at.get(subject, 0.0)))
        for subject in self._agenda.take(now.monotonic, BATCH):
            try:
                plan = self._plan(subject, now)
            except Exception:
                # A defect in one plan must not stop all the others. It is tried again, later each time.
                self._failed(subject)
                self._agenda.put(subject, self._defects.at[subject])
                continue
            self._defects.succeeded(subject)
            if plan is None:
                continue
            self._begin(subject, plan.actions)
            again_in = LOOK_AGAIN if plan.again_in is None else min(plan.again_in, LOOK_AGAIN)
            self._agenda.put(subject, now.monotonic + again_in)
        if departed := self._core.inventory.take_departed():
            self._core.tasks.spawn(self._core.registry.drop_intents(departed), "drop intents")
        for captured in self._core.inventory.take_never_made():
            if self._core.membership.mine(captured.deployment):
                self._core.tasks.spawn(self._core.registry.drop_captured(captured.id), f"drop {captured.id}")
        next_at = self._agenda.next_at()
        return None if next_at is None else max(0.0, next_at - now.monotonic)

    def _failed(self, subject: str) -> None:
        """Log and count an exception, and put off what raised it, longer each time."""
        log.exception("reconcile_failed", subject=subject)
        self._core.metrics.reconciler_errors.inc()
        self._defects.failed(subject, self._core.now())

    def _plan(self, subject: str, now: Moment) -> expiry.Plan | None:
        kind, _, identifier = subject.partition("/")
        retry_at = ChainMap(self._under_way, self._restarts.at, self._backoff.at)
        if kind == "nodes":
            node = self._core.inventory.nodes[identifier]
            plan = expiry.plan_node(node, self._silence, retry_at, now)
            deletions = [a for a in self._room(node) if retry_at.get(a.target, 0.0) <= now.monotonic]
            leaving = (*self._drain(node, retry_at, now.monotonic), *self._balance(node, now.monotonic))
            again_in = plan.again_in
            if node.draining:
                again_in = DRAIN_AGAIN if again_in is None else min(again_in, DRAIN_AGAIN)
            due = (*plan.actions, *deletions, *leaving, *self._reclaim(node, retry_at, now.monotonic))
            return replace(plan, actions=due, again_in=again_in)
        if not self._core.membership.mine(identifier):
            # Another controller acts on it.
            return None
        facts = self.facts(identifier, retry_at)
        if facts.deployment is None and not facts.instances and not facts.snapshots:
            return None
        return expiry.plan(facts, now)

    def _room(self, node: Node) -> tuple[expiry.DeleteSnapshot, ...]:
        inventory = self._core.inventory
        over = 0 < node.snapshot_limit_bytes < inventory.held_bytes(node.id)
        if not over or node.state is not NodeState.READY:
            return ()
        held = []
        for snapshot in inventory.held_on(node.id):
            instances = inventory.instances_of(snapshot.deployment)
            used = max(
                snapshot.create_time,
                snapshot.adopt_time,
                self._core.deployments.last_use.get(snapshot.deployment, 0.0),
            )
            in_use = self._starts.starting(snapshot.deployment) or any(
                i.busy or i.in_flight or i.report.snapshot == snapshot.id for i in instances
            )
            held.append(expiry.Held(snapshot, used, in_use))
        # The others do the same for what they hold.
        mine = self._core.membership.mine
        by_id = {one.snapshot.id: one.snapshot.deployment for one in held}
        return tuple(action for action in expiry.plan_room(node, held) if mine(by_id[action.id]))

    def _reclaim(self, node: Node, retry_at: Mapping[str, float], now: float) -> list[expiry.Action]:
        """End parked instances whose memory is needed."""
        if node.state is not NodeState.READY:
            return []
        # Most heartbeats end here.
        if not any(room.lacking(node, self._core.inventory.instances_on(node.id))):
            return []
        ends = [
            expiry.Stop(one.instance, one.reason)
            for one in room.reclaim(node, self._starts.tenants(node.id), now)
        ]
        return [action for action in ends if retry_at.get(action.target, 0.0) <= now]

    def _drain(self, node: Node, retry_at: Mapping[str, float], now: float) -> tuple[expiry.Action, ...]:
        if not node.draining:
            return ()
        inventory, mine = self._core.inventory, self._core.membership.mine
        # Each controller empties the node of what it holds.
        instances = tuple(i for i in inventory.instances_on(node.id) if mine(i.deployment))
        held = tuple(s for s in inventory.held_on(node.id) if mine(s.deployment))
        owned = self._core.deployments.owned(instances)
        return balance.plan_drain(node, instances, held, owned, retry_at, now)

    def _balance(self, node: Node, now: float) -> Iterator[expiry.Rebalance]:
        target = Rebalance.TARGET.format(node.id)
        resting = self._balanced.at.get(target, 0.0) > now or target in self._under_way
        if not self._rebalance or resting or not node.gpus:
            return
        inventory = self._core.inventory

        def others() -> Iterator[tuple[Node, int]]:
            for other in inventory.nodes.values():
                if other.id != node.id and other.takes_starts and other.gpus:
                    on = inventory.instances_on(other.id)
                    yield other, sum(room.held_bytes(i, gpu.uuid) for i in on for gpu in other.gpus)

        instances = inventory.instances_on(node.id)
        # All of them take memory, and those of other controllers' deployments are moved by these.
        mine = self._core.membership.mine
        owned = self._core.deployments.owned(i for i in instances if mine(i.deployment))
        if (action := balance.plan_balance(node, instances, owned, others, now)) is not None:
            yield action

    def facts(self, deployment: str, retry_at: Mapping[str, float]) -> expiry.Facts:
        """The facts that a deployment is planned from.

        Args:
            deployment: its id.
            retry_at: monotonic times by target, before which no action on it begins.
        """
        core = self._core
        return expiry.Facts(
            deployment=core.deployments.by_id.get(deployment),
            instances=core.inventory.instances_of(deployment),
            snapshots=core.inventory.snapshots_of(deployment),
            nodes=core.inventory.nodes,
            started=core.inventory.intents.keys(),
            last_use=core.deployments.last_use.get(deployment, 0.0),
            starting=self._starts.starting(deployment),
            retry_at=retry_at,
        )

    def _begin(self, subject: str, actions: Iterable[expiry.Action]) -> None:
        for action in actions:
            self._under_way[action.target] = float("inf")
            self._core.tasks.spawn(
                self._carry_out(subject, action), f"{type(action).__name__} {action.target}"
            )

    async def _sleep(self, again_in: float | None) -> None:
        if again_in == 0.0:
            # More is due already, but requests come first.
            await asyncio.sleep(0)
            return
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._wake.wait())]
        if again_in is not None:
            waits.append(asyncio.ensure_future(self._core.clock.sleep(again_in)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _carry_out(self, subject: str, action: expiry.Action) -> None:
        kind = type(action).__name__
        try:
            await self._do(action)
        except DumontError as error:
            log.warning("action_failed", action=kind, target=action.target, reason=error.reason)
            self._core.metrics.actions.labels(kind, "failed").inc()
            if isinstance(action, Park) and error.reason not in TRANSIENT:
                self._core.inventory.refuse_parking(action.id)
            self._backoff.failed(action.target, self._core.now())
        except Exception:
            log.exception("action_crashed", action=kind, target=action.target)
            self._core.metrics.actions.labels(kind, "crashed").inc()
            self._backoff.failed(action.target, self._core.now())
        else:
            log.info("action_done", action=kind, target=action.target, because=action.reason)
            self._core.metrics.actions.labels(kind, "ok").inc()
            self._backoff.succeeded(action.target)
        finally:
            self._under_way.pop(action.target, None)
            self._core.inventory.touch(subject)

    async def _do(self, action: expiry.Action) -> None:
        match action:
            case Park():
                await self._instances.park(action.id)
            case Stop():
                await self._instances.stop(action.id)
            case DeleteSnapshot():
                await self._snapshots.delete(action.id)
            case Publish():
                await self._snapshots.publish(action.id)
            case KeepWarm():
                await self._keep_warm(action.id)
            case Forget():
                await self._core.deployments.forget(action.id)
                self._starts.failures.pop(action.id, None)
            case Evacuate():
                await self._migrations.evacuate(action.id)
            case Rebalance():
                self._balanced.failed(action.target, self._core.now())
                to = Destination(action.node, action.gpu)
                await self._migrations.migrate(action.instance, to)
            case GiveUp():
                await self._core.fleet.give_up(action.id)
            case _:
                assert_never(action)

    async def _keep_warm(self, deployment: str) -> None:
        # An instance that ends soon after each start waits longer each time, although every start succeeds.
        key = KeepWarm(deployment, "").target
        now = self._core.now()
        if now - self._warmed.get(deployment, now) > STABLE_SECONDS:
            self._restarts.succeeded(key)
        self._restarts.failed(key, now)
        await self._starts.keep(deployment)
        self._warmed[deployment] = self._core.now()

    async def _prune_stores(self) -> None:
        """Have a node of each object store prune it, every ``prune_every`` seconds."""
        while True:
            await self._core.clock.sleep(self._prune_every)
            if not self._core.membership.oldest:
                continue
            stores = {
                node.object_store: node.id
                for node in self._core.inventory.nodes.values()
                if node.object_store and node.state is NodeState.READY
            }
            for store, node in stores.items():
                try:
                    pruned = await self._snapshots.prune(node, dry_run=False)
                except DumontError as error:
                    log.warning(
                        "prune_failed", store=store, node=node, reason=error.reason, error=error.message
                    )
                    self._core.metrics.actions.labels("Prune", "failed").inc()
                except Exception:
                    log.exception("prune_crashed", store=store, node=node)
                    self._core.metrics.actions.labels("Prune", "crashed").inc()
                else:
                    log.info(
                        "object_store_pruned",
                        store=store,
                        node=node,
                        objects=pruned.object_count,
                        deleted_bytes=pruned.size_bytes,
                        kept_bytes=pruned.kept_bytes,
                    )
                    self._core.metrics.actions.labels("Prune", "ok").inc()

    async def _save_last_use(self) -> None:
        while True:
            await self._core.clock.sleep(self._save_every)
            try:
                await self._core.deployments.save_last_use()
            except DumontError as error:
                log.warning("save_last_use_failed", reason=error.reason, error=error.message)
            except Exception:
                log.exception("save_last_use_crashed")

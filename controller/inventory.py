"""What the nodes hold, mirrored in memory. Synchronous, so that a check and its move are one step.

Nodes are the truth for instances and snapshots. Only this module stores states, and only
``machine.advance`` makes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace

from controller import machine
from controller.machine import Event
from controller.model import Captured, Instance, InstanceState, Intent, Node, NodeState, Report, Snapshot
from controller.ports import Clock, Removed, Synchronized
from dumont.errors import FailedPrecondition, NotFound


class Inventory:
    """Nodes, instances and snapshots by id.

    ``begin`` marks a command of ours as under way and ``finish`` its outcome; reports that arrive
    in between may be older than the command and do not move the state, unless they tell the end.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = asyncio.Event()
        self._watchers: list[_Watcher] = []
        self.nodes: dict[str, Node] = {}
        self.instances: dict[str, Instance] = {}
        # By node and id: a snapshot may be on several nodes, and published besides.
        self._copies: dict[tuple[str, str], Snapshot] = {}
        self.captured: dict[str, Captured] = {}

    # Looking

    def node(self, node: str) -> Node:
        """Raises: NotFound."""
        if node not in self.nodes:
            raise _not_found("node", node)
        return self.nodes[node]

    def instance(self, instance: str) -> Instance:
        """Raises: NotFound."""
        if instance not in self.instances:
            raise _not_found("instance", instance)
        return self.instances[instance]

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """Every snapshot once, as the node sees it that can do most with it."""
        best: dict[str, Snapshot] = {}
        for copy in self._copies.values():
            other = best.get(copy.id)
            if other is None:
                best[copy.id] = copy
                continue
            better = max(copy, other, key=self._worth)
            best[copy.id] = replace(better, published=copy.published or other.published)
        return best

    def _worth(self, copy: Snapshot) -> tuple[bool, bool, bool, str]:
        ready = copy.node in self.nodes and self.nodes[copy.node].state is NodeState.READY
        return ready, not copy.quarantined, copy.local, copy.node

    def snapshot(self, snapshot: str) -> Snapshot:
        """Raises: NotFound."""
        known = self.snapshots
        if snapshot not in known:
            raise _not_found("snapshot", snapshot)
        return known[snapshot]

    def copies(self, snapshot: str) -> tuple[Snapshot, ...]:
        """The snapshot as each node sees it."""
        return tuple(copy for copy in self._copies.values() if copy.id == snapshot)

    def instances_of(self, deployment: str) -> tuple[Instance, ...]:
        return tuple(i for i in self.instances.values() if i.deployment == deployment)

    def snapshots_of(self, deployment: str) -> tuple[Snapshot, ...]:
        """Those of a deployment, as each node sees them."""
        return tuple(copy for copy in self._copies.values() if copy.deployment == deployment)

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Wait until ``predicate`` holds; it is asked after every change."""
        while not predicate():
            await self._changed.wait()

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change after this call; take it before looking at the facts."""
        return self._changed

    def notify(self) -> None:
        """Tell everyone who waits that facts have changed."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(self) -> AsyncGenerator[Instance | Removed | Synchronized]:
        """Every instance, ``Synchronized``, then each change; a slow reader gets the latest only."""
        watcher = _Watcher()
        self._watchers.append(watcher)
        try:
            for instance in list(self.instances.values()):
                yield instance
            yield Synchronized()
            while True:
                for changed in await watcher.take():
                    current = self.instances.get(changed)
                    yield Removed(changed) if current is None else current
        finally:
            self._watchers.remove(watcher)

    # Nodes

    def put_node(self, node: Node) -> None:
        """Store facts about a node."""
        self.nodes[node.id] = node
        self.notify()

    def move_node(self, node: str, state: NodeState) -> None:
        if self.nodes[node].state is not state:
            self.put_node(replace(self.nodes[node], state=state, since=self._clock.moment().steady))

    def learn(self, node: str, reports: Iterable[Report], snapshots: Iterable[Snapshot]) -> None:
        """Replace all that was known of a node by what it says now; it is ready then."""
        told = {report.id: report for report in reports}
        for instance in list(self.instances.values()):
            if instance.node == node and instance.id not in told and not instance.busy:
                self._apply(instance, Event.SAW_GONE)
        for report in told.values():
            self.report(node, report)
        self.learn_snapshots(node, snapshots)
        self.move_node(node, NodeState.READY)

    def learn_snapshots(self, node: str, snapshots: Iterable[Snapshot]) -> None:
        self._copies = {key: copy for key, copy in self._copies.items() if copy.node != node}
        for snapshot in snapshots:
            self._copies[node, snapshot.id] = self._judge(snapshot)
        self.notify()

    def put_snapshot(self, snapshot: Snapshot) -> None:
        self._copies[snapshot.node, snapshot.id] = self._judge(snapshot)
        self.notify()

    def put_captured(self, captured: Captured) -> None:
        """This controller had it made: its manifest must never hash to anything else."""
        self.captured[captured.id] = captured

    def drop_snapshot(self, snapshot: str, node: str) -> None:
        """The node neither holds nor reaches it any more."""
        self._copies.pop((node, snapshot), None)
        self.notify()

    def _judge(self, snapshot: Snapshot) -> Snapshot:
        """What a node says of a snapshot, against what is known of its making."""
        made = self.captured.get(snapshot.id)
        if made is None:
            return snapshot
        # A manifest that cannot be read names no deployment, and says so by its quarantine.
        snapshot = replace(snapshot, deployment=snapshot.deployment or made.deployment, ours=True)
        if snapshot.quarantined or snapshot.manifest_digest == made.manifest_digest:
            return snapshot
        return replace(
            snapshot,
            quarantined=True,
            quarantine_reason=f"MANIFEST_REPLACED: its manifest is {snapshot.manifest_digest[:16]}… and was "
            f"{made.manifest_digest[:16]}… when it was captured",
        )

    # Reports

    def report(self, node: str, report: Report) -> None:
        """Take in what a node says of an instance."""
        known = self.instances.get(report.id)
        if known is None:
            # Whom a stranger has served is unknown; only one that still starts has surely served nobody.
            starting = report.state is InstanceState.STARTING
            known = replace(self._new(node, report), served=not starting)
        known = replace(known, report=report)
        if known.busy and report.state is not InstanceState.FAILED:
            self._store(known)
        else:
            self._apply(known, machine.SAW[report.state])

    def removed(self, instance: str) -> None:
        if instance in self.instances:
            self._apply(self.instances[instance], Event.SAW_GONE)

    # Commands

    def expect(self, intent: Intent) -> None:
        """An instance is about to be started or restored under the intent's id."""
        report = Report(
            intent.instance,
            intent.deployment,
            InstanceState.STARTING,
            snapshot=intent.snapshot,
            create_time=intent.create_time,
        )
        self._apply(replace(self._new(intent.node, report), busy=True), Event.START)

    def begin(self, instance: str, event: Event, force: bool = False) -> Instance:
        """A command is about to be sent; ``force`` allows it while requests are in flight.

        Raises:
            NotFound: there is no such instance.
            FailedPrecondition: INSTANCE_BUSY, requests are in flight; ILLEGAL_TRANSITION, its state
                forbids the command.
        """
        known = self.instance(instance)
        if known.busy:
            raise machine.IllegalTransition(instance, known.state, event)
        state = machine.advance(instance, known.state, event)
        if known.in_flight and not force:
            raise FailedPrecondition(
                "INSTANCE_BUSY",
                f"instances/{instance} has {known.in_flight} requests in flight; wait for them and try again",
                metadata={"instance": f"instances/{instance}", "in_flight": str(known.in_flight)},
                retry_after=1.0,
            )
        return self._move(replace(known, busy=True), state)

    def finish(self, instance: str, event: Event, report: Report | None = None) -> None:
        """A command has ended with ``event``; an instance that is gone by now is left alone."""
        known = self.instances.get(instance)
        if known is None:
            return
        if report is not None:
            known = replace(known, report=report)
        self._apply(replace(known, busy=False), event)

    def refuse_parking(self, instance: str) -> None:
        """It could not be parked: stop it next time instead."""
        if instance in self.instances:
            self._store(replace(self.instances[instance], park_refused=True))

    def lease(self, instance: str, sequences: int = 1) -> None:
        """A request enters a serving instance. Never waits: this is the hot path."""
        known = self.instances[instance]
        self.instances[instance] = replace(known, served=True, in_flight=known.in_flight + sequences)

    def release(self, instance: str, sequences: int = 1) -> None:
        """A request has left it."""
        known = self.instances.get(instance)
        if known is None:
            return
        left = known.in_flight - sequences
        self.instances[instance] = replace(known, in_flight=left, idle_since=self._clock.moment().steady)
        if left == 0:
            self.notify()

    # The only three places that write an instance's state

    def _new(self, node: str, report: Report) -> Instance:
        now = self._clock.moment().steady
        return Instance(node, InstanceState.UNKNOWN, report, since=now, idle_since=now)

    def _apply(self, instance: Instance, event: Event) -> None:
        self._move(instance, machine.advance(instance.id, instance.state, event))

    def _move(self, instance: Instance, state: InstanceState) -> Instance:
        if state is not instance.state:
            now = self._clock.moment().steady
            # A park that did not happen leaves it as idle as it was.
            woke = state is InstanceState.SERVING and instance.state is not InstanceState.PARKING
            idle = now if woke else instance.idle_since
            instance = replace(instance, state=state, since=now, idle_since=idle)
        self._store(instance)
        return instance

    def _store(self, instance: Instance) -> None:
        if instance.state is InstanceState.GONE:
            self.instances.pop(instance.id, None)
        else:
            self.instances[instance.id] = instance
        for watcher in self._watchers:
            watcher.mark(instance.id)
        self.notify()


class _Watcher:
    """Ids that changed since the last look; bounded by the number of instances."""

    def __init__(self) -> None:
        self._changed: dict[str, None] = {}
        self._event = asyncio.Event()

    def mark(self, instance: str) -> None:
        self._changed[instance] = None
        self._event.set()

    async def take(self) -> list[str]:
        await self._event.wait()
        self._event.clear()
        changed, self._changed = list(self._changed), {}
        return changed


def _not_found(kind: str, identifier: str) -> NotFound:
    return NotFound(
        f"{kind.upper()}_NOT_FOUND",
        f"there is no {kind}s/{identifier}; list the {kind}s to see what there is",
        metadata={kind: f"{kind}s/{identifier}"},
    )

"""What the nodes hold, mirrored in memory. Synchronous, so that a check and its transition are one step.

The nodes decide what is true of instances and snapshots. Only this module stores states, and only
``lifecycle.advance`` computes them. Instances and snapshots are indexed by deployment, and whoever waits is
notified by deployment or node, so that no step has to look at everything.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Final

from controller import lifecycle, room
from controller.estimates import Estimates
from controller.lifecycle import Event
from controller.model import Captured, Instance, InstanceState, Intent, Node, NodeState, Report, Snapshot
from controller.ports import Clock, ListedSnapshots, Removed, Synchronized
from controller.room import Need
from dumont import names
from dumont.errors import FailedPrecondition, NotFound

# Of those who wait for room, how many are woken when memory becomes free.
WOKEN: Final = 8
# States after which an instance may hold less memory, or may yield what it holds.
FREEING: Final = frozenset(
    {InstanceState.SERVING, InstanceState.PARKED, InstanceState.FAILED, InstanceState.GONE}
)


class Inventory:
    """Nodes, instances and snapshots by id.

    ``begin`` marks a command of ours as under way and ``finish`` its outcome; reports that arrive
    in between may be older than the command and do not change the state, unless they say that the instance
    has failed or is gone.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        # Those who wait for room, in the order in which they are woken.
        self._for_room: list[tuple[int, float, int, asyncio.Event]] = []
        self._serials = count()
        self._changed: dict[str, None] = {}
        # Called at every change.
        self.on_change: Callable[[], None] = lambda: None
        self._watchers: list[_Watcher] = []
        # What was measured of starts and sizes.
        self.estimates = Estimates()
        # Why each instance was started or resumed, as far as this controller did it.
        self.reasons: dict[str, tuple[str, ...]] = {}
        self.nodes: dict[str, Node] = {}
        self.instances: dict[str, Instance] = {}
        # By id and node: a snapshot may be on several nodes, and in the object store as well.
        self._copies: dict[str, dict[str, Snapshot]] = {}
        # Ids of instances and snapshots by deployment, and of instances by node, in the order in which they
        # appeared.
        self._instances_of: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._instances_on: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._snapshots_of: defaultdict[str, dict[str, None]] = defaultdict(dict)
        # What this controller has recorded; only a snapshot or an instance that is recorded is its own.
        self.captured: dict[str, Captured] = {}
        self.intents: dict[str, Intent] = {}
        # The nodes of these by deployment and id.
        self._started_on: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self._captured_on: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self._departed: list[str] = []
        # The nodes of captures that may never have been made, by snapshot, and those that were not.
        self._unmade: dict[str, str] = {}
        self._never_made: list[Captured] = []
        # The snapshots that each node holds, with their bytes, and the sums of these.
        self._held: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._held_bytes: defaultdict[str, int] = defaultdict(int)
        # By snapshot: the wall time since which no known node can restore it.
        self._unusable_since: dict[str, float] = {}

    # Looking

    def node(self, node: str) -> Node:
        """The node of this id. Raises: NotFound."""
        if node not in self.nodes:
            raise _not_found("node", node, self.nodes)
        return self.nodes[node]

    def instance(self, instance: str) -> Instance:
        """The instance of this id. Raises: NotFound."""
        if instance not in self.instances:
            raise _not_found("instance", instance, self.instances)
        return self.instances[instance]

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """Every snapshot once, as the node that can do most with it sees it."""
        return {snapshot: self._best(snapshot) for snapshot in self._copies}

    def _best(self, snapshot: str) -> Snapshot:
        copies = self._copies[snapshot].values()
        best = max(copies, key=self._worth)
        published = any(copy.published for copy in copies)
        return replace(best, published=published, unusable_since=self._unusable_since.get(snapshot))

    def _worth(self, copy: Snapshot) -> tuple[bool, bool, bool, bool, str]:
        ready = copy.node in self.nodes and self.nodes[copy.node].state is NodeState.READY
        return ready, not copy.quarantined, not copy.incompatibility, copy.local, copy.node

    def snapshot(self, snapshot: str) -> Snapshot:
        """The snapshot of this id, as the most capable node sees it. Raises: NotFound."""
        if snapshot not in self._copies:
            raise _not_found("snapshot", snapshot, self._copies)
        return self._best(snapshot)

    def copies(self, snapshot: str) -> tuple[Snapshot, ...]:
        """The snapshot as each node sees it."""
        return tuple(self._copies.get(snapshot, {}).values())

    def instances_of(self, deployment: str) -> tuple[Instance, ...]:
        """The instances that name a deployment, whoever started them; see ``Deployment.runs``."""
        return tuple(self.instances[instance] for instance in self._instances_of.get(deployment, ()))

    def instances_on(self, node: str) -> tuple[Instance, ...]:
        """The instances that a node has, or is about to have."""
        return tuple(self.instances[instance] for instance in self._instances_on.get(node, ()))

    def snapshots_of(self, deployment: str) -> tuple[Snapshot, ...]:
        """The snapshots that name a deployment, orphans included, each as ``snapshots`` has it."""
        return tuple(self._best(snapshot) for snapshot in self._snapshots_of.get(deployment, ()))

    def copies_of(self, deployment: str) -> tuple[Snapshot, ...]:
        """The snapshots that name a deployment, as each node sees them."""
        known = self._snapshots_of.get(deployment, ())
        return tuple(copy for snapshot in known for copy in self._copies[snapshot].values())

    def copy_on(self, node: str, deployment: str) -> Snapshot | None:
        """The newest snapshot of a deployment that a node could restore, held or published; None: none."""
        copies = (self._copies[known].get(node) for known in self._snapshots_of.get(deployment, ()))
        usable = (c for c in copies if c is not None and not (c.orphan or c.quarantined or c.incompatibility))
        return max(usable, key=lambda copy: (copy.local, copy.age_key), default=None)

    def started_on(self, deployment: str) -> frozenset[str]:
        """The nodes on which this controller has started instances that it does not know to be gone."""
        return frozenset(self._started_on.get(deployment, {}).values())

    def captured_on(self, deployment: str) -> frozenset[str]:
        """The nodes on which this controller has made snapshots that it has not deleted."""
        return frozenset(self._captured_on.get(deployment, {}).values())

    async def until(self, predicate: Callable[[], bool], *subjects: str) -> None:
        """Wait until ``predicate`` holds.

        Args:
            predicate: asked now and after every change.
            subjects: names of the deployments and nodes whose changes may make it true, such as
                ``deployments/qa``; none: any change may.
        """
        with self.watched(*subjects) as changed:
            while not predicate():
                await changed.wait()
                changed.clear()

    @contextmanager
    def watched(self, *subjects: str) -> Iterator[asyncio.Event]:
        """An event that every change of these deployments and nodes sets; see ``until``."""
        changed = asyncio.Event()
        for subject in subjects or ("",):
            self._waiters[subject].add(changed)
        try:
            yield changed
        finally:
            for subject in subjects or ("",):
                self._waiters[subject].discard(changed)
                if not self._waiters[subject]:
                    del self._waiters[subject]

    def touch(self, subject: str) -> None:
        """Facts about ``deployments/ID`` or ``nodes/ID`` have changed: wake who waits, and plan it again."""
        self._changed[subject] = None
        self.on_change()
        for changed in (*self._waiters.get(subject, ()), *self._waiters.get("", ())):
            changed.set()

    @contextmanager
    def waiting_for_room(self, priority: int, since: float) -> Iterator[asyncio.Event]:
        """An event that is set when memory of any node may have become free.

        Who waits with the highest priority is woken first, and among equals who has waited longest. Only the
        first few are: memory that becomes free is enough for about one, and each has to decide again.

        Args:
            priority: of the deployment that waits.
            since: monotonic time from which it has waited.
        """
        waiter = (-priority, since, next(self._serials), asyncio.Event())
        insort(self._for_room, waiter, key=lambda one: one[:3])
        try:
            yield waiter[3]
        finally:
            self._for_room.remove(waiter)

    def _freed(self) -> None:
        """Memory of a node may have become free: wake the first of those who wait for room."""
        for *_, freed in self._for_room[:WOKEN]:
            freed.set()

    def take_changed(self) -> Iterable[str]:
        """The deployments and nodes that changed since the last call."""
        changed, self._changed = self._changed, {}
        return changed

    def take_departed(self) -> list[str]:
        """The instances with an intent that have gone since the last call."""
        departed, self._departed = self._departed, []
        return departed

    def take_never_made(self) -> list[Captured]:
        """The records of captures that were not made after all, since this was called last."""
        never_made, self._never_made = self._never_made, []
        return never_made

    async def watch(self) -> AsyncGenerator[Instance | Removed | Synchronized]:
        """Every instance, ``Synchronized``, then each change; a slow reader skips outdated states."""
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
        known = self.nodes.get(node.id)
        self.nodes[node.id] = node
        self.touch(f"nodes/{node.id}")
        if node.state is NodeState.READY and (known is None or known.state is not NodeState.READY):
            self._freed()
        if known is not None and (known.state, known.draining) != (node.state, node.draining):
            # What can be done with everything on this node has changed.
            for deployment in self._on(node.id):
                self.touch(f"deployments/{deployment}")

    def set_node_state(self, node: str, state: NodeState) -> None:
        """Change a node's state; does nothing if it is in that state already."""
        if self.nodes[node].state is not state:
            self.put_node(replace(self.nodes[node], state=state, since=self._clock.moment().monotonic))

    def learn_free(self, node: str, uuid: str, free_bytes: int) -> None:
        """A node says that a GPU has no more memory free than this: something else holds the rest."""
        known = self.nodes[node]
        held = sum(room.held_bytes(instance, uuid) for instance in self.instances_on(node))
        self.nodes[node] = replace(
            known,
            gpus=tuple(
                replace(
                    gpu,
                    free_bytes=free_bytes,
                    other_bytes=max(gpu.other_bytes, gpu.total_bytes - held - free_bytes),
                )
                if gpu.uuid == uuid
                else gpu
                for gpu in known.gpus
            ),
        )

    def learn(self, node: str, reports: Iterable[Report], snapshots: ListedSnapshots) -> None:
        """Replace all that was known of a node by what it reports now; the node is ready from then on."""
        reported = {report.id: report for report in reports}
        for instance in list(self.instances.values()):
            if instance.node == node and instance.id not in reported and not instance.busy:
                self._apply(instance, Event.SAW_GONE)
        for report in reported.values():
            self.report(node, report)
        for intent in [i for i in self.intents.values() if i.node == node]:
            if intent.instance not in self.instances:
                # The node never started it.
                self._depart(intent.instance)
        self.learn_snapshots(node, snapshots)
        self.set_node_state(node, NodeState.READY)

    def learn_snapshots(self, node: str, listed: ListedSnapshots) -> None:
        """Replace what was known of the snapshots that a node can restore, as far as the node can tell."""
        reported = {snapshot.id: snapshot for snapshot in listed.snapshots}
        for snapshot, copies in list(self._copies.items()):
            if node not in copies or snapshot in reported:
                continue
            known = copies[node]
            if not (listed.store_silence and known.published):
                self.drop_snapshot(snapshot, node)
            elif known.local:
                # The snapshot has left the node; whether it is in the object store is not known at present.
                self.put_snapshot(replace(known, local=False))
        for found in reported.values():
            self.put_snapshot(found)
        for snapshot in [s for s, on in self._unmade.items() if on == node and s not in reported]:
            captured = self.captured[snapshot]
            on_node = (i for i in self.instances_of(captured.deployment) if i.node == node)
            if not any(i.busy or i.state is InstanceState.CAPTURING for i in on_node):
                # Whoever recorded it died before the node was asked.
                self.drop_captured(snapshot)
                self._never_made.append(captured)
                self.touch(f"deployments/{captured.deployment}")

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Take in what a node reports of a snapshot."""
        made = self.captured.get(snapshot.id)
        if made is not None and not made.manifest_digest and snapshot.local and not snapshot.quarantined:
            # The controller that asked for this capture ended before the node answered; the node answers now.
            self.captured[snapshot.id] = replace(made, manifest_digest=snapshot.manifest_digest)
            self._unmade.pop(snapshot.id, None)
        judged = self._judge(snapshot)
        copies = self._copies.setdefault(snapshot.id, {})
        known = copies.get(snapshot.node)
        copies[snapshot.node] = judged
        self._weigh(judged.node, judged.id, judged.size_bytes if judged.local else None)
        if known is not None and known.deployment != judged.deployment:
            self._index_snapshot(snapshot.id, known.deployment)
        self._index_snapshot(snapshot.id, judged.deployment)

    def put_captured(self, captured: Captured) -> None:
        """Record that this controller captured or adopted a snapshot: its manifest must never change."""
        self.drop_captured(captured.id)
        self.captured[captured.id] = captured
        if not captured.manifest_digest and captured.node:
            self._unmade[captured.id] = captured.node
        self._captured_on[captured.deployment][captured.id] = captured.node
        for copy in self.copies(captured.id):
            self.put_snapshot(copy)

    def drop_captured(self, snapshot: str) -> None:
        """Remove the record of a snapshot of which nothing is left."""
        captured = self.captured.pop(snapshot, None)
        self._unmade.pop(snapshot, None)
        if captured is not None:
            _drop(self._captured_on, captured.deployment, snapshot)

    def drop_snapshot(self, snapshot: str, node: str) -> None:
        """The node neither holds the snapshot nor finds it in the object store any more."""
        copies = self._copies.get(snapshot, {})
        dropped = copies.pop(node, None)
        if not copies:
            self._copies.pop(snapshot, None)
        if dropped is not None:
            self._weigh(node, snapshot, None)
            self._index_snapshot(snapshot, dropped.deployment)

    def _weigh(self, node: str, snapshot: str, size: int | None) -> None:
        before = self._held[node].pop(snapshot, None)
        if size is not None:
            self._held[node][snapshot] = size
        if before != size:
            self._held_bytes[node] += (size or 0) - (before or 0)
            if node in self.nodes:
                self.touch(f"nodes/{node}")

    def held_bytes(self, node: str) -> int:
        """What the snapshots take that a node holds."""
        return self._held_bytes.get(node, 0)

    def held_on(self, node: str) -> tuple[Snapshot, ...]:
        """The snapshots that a node holds, as it sees them."""
        return tuple(self._copies[snapshot][node] for snapshot in self._held.get(node, ()))

    def _index_snapshot(self, snapshot: str, deployment: str) -> None:
        copies = self._copies.get(snapshot, {}).values()
        if copies and all(copy.incompatibility for copy in copies):
            self._unusable_since.setdefault(snapshot, self._clock.moment().wall)
        else:
            self._unusable_since.pop(snapshot, None)
        if any(copy.deployment == deployment for copy in copies):
            self._snapshots_of[deployment][snapshot] = None
        else:
            self._snapshots_of[deployment].pop(snapshot, None)
            if not self._snapshots_of[deployment]:
                del self._snapshots_of[deployment]
        self.touch(f"deployments/{deployment}")

    def _on(self, node: str) -> set[str]:
        """The deployments with an instance or a snapshot that this node holds or can fetch."""
        held = {instance.deployment for instance in self.instances.values() if instance.node == node}
        return held | {copies[node].deployment for copies in self._copies.values() if node in copies}

    def _judge(self, snapshot: Snapshot) -> Snapshot:
        """Compare what a node reports of a snapshot with the record of its capture."""
        made = self.captured.get(snapshot.id)
        if made is None or not (made.manifest_digest or snapshot.local):
            return replace(snapshot, owner=None)
        snapshot = replace(
            snapshot, deployment=made.deployment, owner=made.deployment_uid, adopt_time=made.adopt_time
        )
        if snapshot.quarantined or made.manifest_digest in ("", snapshot.manifest_digest):
            return snapshot
        return replace(
            snapshot,
            quarantined=True,
            quarantine_reason=f"MANIFEST_REPLACED: its manifest is {snapshot.manifest_digest[:16]}… and was "
            f"{made.manifest_digest[:16]}… when it was captured",
        )

    # Reports

    def report(self, node: str, report: Report) -> None:
        """Take in what a node reports of an instance."""
        known = self.instances.get(report.id)
        if known is None:
            # An instance not seen before may have served anyone, unless it is still starting.
            starting = report.state is InstanceState.STARTING
            known = replace(self._new(node, report), served=not starting)
        self._measure(node, report, known.report)
        known = replace(known, report=_complete(report, known.report))
        if known.busy and report.state is not InstanceState.FAILED:
            self._store(known)
        else:
            self._apply(known, lifecycle.SAW[report.state])

    def _measure(self, node: str, report: Report, before: Report) -> None:
        size = next((copy.size_bytes for copy in self.copies(report.snapshot)), 0) if report.snapshot else 0
        # One that was not known before has its report already, and is measured by it.
        self.estimates.learn(node, report, None if report is before else before, size)

    def removed(self, instance: str) -> None:
        """Take in that an instance is gone from its node."""
        if instance in self.instances:
            self._apply(self.instances[instance], Event.SAW_GONE)

    def lost(self, instance: str) -> None:
        """Nobody knows whether this instance exists: keep its intent until its node has reported."""
        intent = self.intents.pop(instance, None)
        self.removed(instance)
        if intent is not None:
            self.intents[instance] = intent

    def put_intent(self, intent: Intent) -> None:
        """An instance was or is to be started by this controller."""
        self.intents[intent.instance] = intent
        self._started_on[intent.deployment][intent.instance] = intent.node

    # Commands

    def expect(self, intent: Intent, need: Need | None = None) -> None:
        """An instance is about to be started or restored under the intent's id, and will need so much."""
        self.put_intent(intent)
        need = need or Need(intent.deployment)
        report = Report(
            intent.instance,
            intent.deployment,
            InstanceState.STARTING,
            snapshot=intent.snapshot,
            create_time=intent.create_time,
            gpu=need.gpu,
            gpu_bytes=need.gpu_bytes if need.gpu else 0,
            ram_bytes=need.ram_bytes,
        )
        self._apply(replace(self._new(intent.node, report), busy=True), Event.START)

    def begin(self, instance: str, event: Event, force: bool = False) -> Instance:
        """Mark a command as under way, before it is sent.

        Args:
            instance: its id.
            event: the command.
            force: allow it while requests are in flight.

        Raises:
            NotFound: there is no such instance.
            FailedPrecondition: INSTANCE_BUSY, requests are in flight; ILLEGAL_TRANSITION, its state
                forbids the command.
        """
        known = self.instance(instance)
        if known.busy:
            raise lifecycle.IllegalTransition(instance, known.state, event)
        state = lifecycle.advance(instance, known.state, event)
        if known.in_flight and not force:
            raise FailedPrecondition(
                "INSTANCE_BUSY",
                f"instances/{instance} has {known.in_flight} requests in flight; wait for them and try again",
                metadata={"instance": f"instances/{instance}", "in_flight": str(known.in_flight)},
                retry_after=1.0,
            )
        return self._set_state(replace(known, busy=True), state)

    def finish(self, instance: str, event: Event, report: Report | None = None) -> None:
        """Mark a command as ended with the outcome ``event``; does nothing if the instance is gone by now."""
        known = self.instances.get(instance)
        if known is None:
            return
        if report is not None:
            self._measure(known.node, report, known.report)
            known = replace(known, report=_complete(report, known.report))
        self._apply(replace(known, busy=False), event)

    def aim(self, instance: str, gpu: str) -> None:
        """A parked instance is to resume on this GPU; empty: on the one that it was on."""
        known = self.instances[instance]
        if gpu:
            self._store(replace(known, report=replace(known.report, gpu=gpu)))

    def refuse_parking(self, instance: str) -> None:
        """Remember that an instance cannot be parked, so that it is stopped instead."""
        if instance in self.instances:
            self._store(replace(self.instances[instance], park_refused=True))

    def set_draining(self, instance: str, draining: bool) -> None:
        """Another instance takes this one's place, or does not after all; nothing if it is gone."""
        if instance in self.instances:
            self._store(replace(self.instances[instance], draining=draining))

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
        self.instances[instance] = replace(known, in_flight=left, idle_since=self._clock.moment().monotonic)
        if left == 0:
            self.touch(f"deployments/{known.deployment}")
            self._freed()

    # The only three places that write an instance's state

    def _new(self, node: str, report: Report) -> Instance:
        now = self._clock.moment().monotonic
        return Instance(node, InstanceState.UNKNOWN, report, since=now, idle_since=now)

    def _apply(self, instance: Instance, event: Event) -> None:
        self._set_state(instance, lifecycle.advance(instance.id, instance.state, event))

    def _set_state(self, instance: Instance, state: InstanceState) -> Instance:
        if state is not instance.state:
            now = self._clock.moment().monotonic
            # A park that failed leaves the instance as idle as it was.
            woke = state is InstanceState.SERVING and instance.state is not InstanceState.PARKING
            idle = now if woke else instance.idle_since
            instance = replace(instance, state=state, since=now, idle_since=idle)
            self._store(instance)
            if state in FREEING:
                self._freed()
        else:
            self._store(instance)
        return instance

    def _store(self, instance: Instance) -> None:
        if instance.state is InstanceState.GONE:
            self.instances.pop(instance.id, None)
            self._instances_of[instance.deployment].pop(instance.id, None)
            if not self._instances_of[instance.deployment]:
                del self._instances_of[instance.deployment]
            self._instances_on[instance.node].pop(instance.id, None)
            self.reasons.pop(instance.id, None)
            self._depart(instance.id)
        else:
            self.instances[instance.id] = instance
            self._instances_on[instance.node][instance.id] = None
            self._instances_of[instance.deployment][instance.id] = None
        for watcher in self._watchers:
            watcher.mark(instance.id)
        if instance.node in self.nodes and self.nodes[instance.node].draining:
            self.touch(f"nodes/{instance.node}")
        self.touch(f"deployments/{instance.deployment}")

    def _depart(self, instance: str) -> None:
        intent = self.intents.pop(instance, None)
        if intent is not None:
            _drop(self._started_on, intent.deployment, instance)
            self._departed.append(instance)
            self.touch(f"nodes/{intent.node}")


class _Watcher:
    """Ids that changed since they were last taken; bounded by the number of instances."""

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


def _complete(report: Report, before: Report) -> Report:
    """A report with the GPU memory that was known or expected, where the node has not measured it yet."""
    if report.gpu_bytes or not before.gpu_bytes or report.gpu not in ("", before.gpu):
        return report
    if not report.gpu and report.device == "cpu":
        return report
    return replace(report, gpu=before.gpu, gpu_bytes=before.gpu_bytes)


def _drop(index: dict[str, dict[str, str]], deployment: str, identifier: str) -> None:
    index[deployment].pop(identifier, None)
    if not index[deployment]:
        del index[deployment]


def _not_found(kind: str, identifier: str, known: Iterable[str]) -> NotFound:
    advice = names.did_you_mean(identifier, known) or f"; list the {kind}s to see what there is"
    return NotFound(
        f"{kind.upper()}_NOT_FOUND",
        f"there is no {kind}s/{identifier}{advice}",
        metadata={kind: f"{kind}s/{identifier}"},
    )

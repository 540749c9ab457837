"""What is to be parked, stopped, deleted or started now, and when to plan again. Pure.

A plan concerns one deployment or one node, so that a change costs only what depends on it. Each rule yields
an action and the monotonic time at which it is due; an action that is not due yet determines when to plan
again. An instance that serves a request, starts or is being captured is never touched, and neither is
anything that this controller has not recorded as its own.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from controller.model import (
    Deployment,
    Instance,
    InstanceState,
    Moment,
    Node,
    NodeState,
    Snapshot,
    StartMode,
    Storage,
)

FAILED_KEPT: Final = 300.0
LIVE: Final = frozenset(
    {
        InstanceState.STARTING,
        InstanceState.SERVING,
        InstanceState.CAPTURING,
        InstanceState.PARKING,
        InstanceState.PARKED,
        InstanceState.RESUMING,
        InstanceState.MOVING,
    }
)
STOPPABLE: Final = frozenset(
    {InstanceState.STARTING, InstanceState.SERVING, InstanceState.PARKED, InstanceState.FAILED}
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a deployment, and of the instances and snapshots that name it.

    Args:
        deployment: None when there is none of that id.
        instances: the ones that name the deployment.
        snapshots: the ones that name the deployment, each once.
        nodes: all nodes by id.
        started: the ids of instances that this controller started.
        last_use: wall time of the deployment's last use.
        starting: whether a start runs or a request waits.
        retry_at: monotonic times by target, before which no action on it is tried again.
    """

    deployment: Deployment | None = None
    instances: tuple[Instance, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    nodes: Mapping[str, Node] = field(default_factory=dict)
    started: Container[str] = frozenset()
    last_use: float = 0.0
    starting: bool = False
    retry_at: Mapping[str, float] = field(default_factory=dict)

    def within_reach(self, node: str) -> bool:
        """Whether commands can be sent to a node."""
        return node in self.nodes and self.nodes[node].state is NodeState.READY

    def owned(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot is this deployment's, rather than an orphan or an earlier deployment's."""
        return self.deployment is not None and snapshot.owner == self.deployment.uid


@dataclass(frozen=True, slots=True)
class _Action:
    """What is to be done with the instance, snapshot, deployment or node of this id, and why."""

    TARGET: ClassVar[str]
    id: str
    reason: str

    @property
    def target(self) -> str:
        """The name under which the action is delayed and retried."""
        return self.TARGET.format(self.id)


class Park(_Action):
    """Freeze an idle instance."""

    __slots__ = ()
    TARGET = "instances/{}"


class Stop(_Action):
    """End an instance."""

    __slots__ = ()
    TARGET = "instances/{}"


class DeleteSnapshot(_Action):
    """Delete a snapshot wherever it is."""

    __slots__ = ()
    TARGET = "snapshots/{}"


class Publish(_Action):
    """Have a snapshot uploaded to the object store."""

    __slots__ = ()
    # Not the snapshot's own name: an upload under way must not delay deleting the snapshot.
    TARGET = "snapshots/{}/upload"


class KeepWarm(_Action):
    """Start an instance of a deployment that must always have some."""

    __slots__ = ()
    # Not the deployment's own name: waiting to restart it must not delay forgetting it.
    TARGET = "deployments/{}/instances"


class Forget(_Action):
    """Remove a deployment that was being deleted and of which nothing is left."""

    __slots__ = ()
    TARGET = "deployments/{}"


class GiveUp(_Action):
    """Send nothing more to a node that has been silent for too long."""

    __slots__ = ()
    TARGET = "nodes/{}"


class Evacuate(_Action):
    """Bring an instance off a node that is being drained."""

    __slots__ = ()
    # Not the instance's own name: it is stopped once another instance has taken its place.
    TARGET = "instances/{}/node"


@dataclass(frozen=True, slots=True)
class Rebalance(_Action):
    """Bring an idle instance off a crowded GPU: to another one of its node, or to another node."""

    # One at a time on each node, of which ``id`` is the id.
    TARGET = "nodes/{}/balance"
    instance: str
    gpu: str = ""
    node: str = ""


Action = Park | Stop | DeleteSnapshot | Publish | KeepWarm | Forget | GiveUp | Evacuate | Rebalance


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions due now, and the seconds until the next one may be; None: none is foreseen."""

    actions: tuple[Action, ...]
    again_in: float | None


def plan(facts: Facts, now: Moment) -> Plan:
    """The actions on a deployment that are due at ``now``."""
    return _due(_rules(facts, now), facts.retry_at, now)


def plan_node(node: Node, silence: float, retry_at: Mapping[str, float], now: Moment) -> Plan:
    """Give up a node that has been silent for too long.

    Args:
        node: the node.
        silence: seconds without a heartbeat after which it is given up.
        retry_at: as in ``Facts``.
        now: the time.
    """
    return _due(_node(node, silence), retry_at, now)


@dataclass(frozen=True, slots=True)
class Held:
    """A snapshot that a node holds. ``last_use`` is a wall time; while ``in_use`` it must be kept."""

    snapshot: Snapshot
    last_use: float
    in_use: bool


def plan_room(node: Node, held: Sequence[Held]) -> tuple[DeleteSnapshot, ...]:
    """Delete the least recently used snapshots of a node until it keeps to its limit.

    Published snapshots are not deleted, because the node evicts them by itself, and neither are orphans.
    """
    excess = sum(one.snapshot.size_bytes for one in held) - node.snapshot_limit_bytes
    actions: list[DeleteSnapshot] = []
    if not node.snapshot_limit_bytes:
        return ()
    for one in sorted(held, key=lambda one: (one.last_use, one.snapshot.id)):
        if excess <= 0:
            break
        if one.snapshot.orphan or one.in_use:
            continue
        excess -= one.snapshot.size_bytes
        if one.snapshot.published:
            continue
        reason = f"nodes/{node.id} holds more than {node.snapshot_limit_bytes} bytes of snapshots"
        actions.append(DeleteSnapshot(one.snapshot.id, reason))
    return tuple(actions)


def _due(rules: Iterator[tuple[float, Action]], retry_at: Mapping[str, float], now: Moment) -> Plan:
    actions: list[Action] = []
    next_at: float | None = None
    for due, action in rules:
        at = max(due, retry_at.get(action.target, due))
        if at <= now.monotonic:
            actions.append(action)
        else:
            next_at = at if next_at is None else min(next_at, at)
    return Plan(tuple(actions), None if next_at is None else next_at - now.monotonic)


def _rules(facts: Facts, now: Moment) -> Iterator[tuple[float, Action]]:
    for instance in facts.instances:
        if facts.within_reach(instance.node) and instance.deployment and not instance.busy:
            yield from _instance(facts, instance, now)
    for snapshot in facts.snapshots:
        if facts.within_reach(snapshot.node) and not snapshot.orphan:
            yield from _snapshot(facts, snapshot, now)
    if facts.deployment is not None:
        yield from _deployment(facts, facts.deployment, now)


def _node(node: Node, silence: float) -> Iterator[tuple[float, Action]]:
    if node.state is NodeState.UNREACHABLE:
        return
    yield node.heartbeat_at + silence, GiveUp(node.id, "no heartbeat")
    if node.state is NodeState.CONNECTING:
        yield node.since + silence, GiveUp(node.id, "its snapshotd does not answer")


def _instance(facts: Facts, instance: Instance, now: Moment) -> Iterator[tuple[float, Action]]:
    if instance.in_flight or facts.starting:
        return
    deployment = facts.deployment
    if deployment is None or not deployment.runs(instance.report):
        # Only an instance that this controller started; any other belongs to somebody else.
        if instance.state in STOPPABLE and instance.id in facts.started:
            yield now.monotonic, Stop(instance.id, "its deployment is gone")
    elif deployment.deleting:
        if instance.state in STOPPABLE:
            yield now.monotonic, Stop(instance.id, "its deployment is being deleted")
    elif instance.state is InstanceState.FAILED:
        yield instance.since + FAILED_KEPT, Stop(instance.id, "it failed")
    elif instance.draining and instance.state in STOPPABLE:
        yield now.monotonic, Stop(instance.id, "another instance has taken its place")
    elif instance.state is InstanceState.SERVING:
        yield from _serving(facts, instance, deployment, now)
    elif instance.state is InstanceState.PARKED and deployment.start_mode is not StartMode.WARM:
        yield instance.since + deployment.park_seconds, Stop(instance.id, "park_timeout has passed")


def _serving(
    facts: Facts, instance: Instance, deployment: Deployment, now: Moment
) -> Iterator[tuple[float, Action]]:
    serving = sorted(
        (
            i
            for i in facts.instances
            if i.state is InstanceState.SERVING
            and not i.draining
            and deployment.runs(i.report)
            and facts.within_reach(i.node)
        ),
        key=lambda i: (i.report.create_time, i.id),
    )
    # Requests go to the oldest while it has capacity to spare, so the others become idle first.
    older = [i.id for i in serving].index(instance.id) if instance in serving else len(serving)
    warm = deployment.start_mode is StartMode.WARM
    if older < deployment.kept_instances:
        return
    idle_at = instance.idle_since + deployment.idle_seconds
    if warm and older >= deployment.most_instances:
        yield now.monotonic, Stop(instance.id, f"instances/{serving[0].id} is kept warm already")
    elif warm or deployment.start_mode is StartMode.COLD:
        yield idle_at, Stop(instance.id, "idle_timeout has passed")
    elif instance.park_refused:
        yield idle_at, Stop(instance.id, "idle_timeout has passed and it could not be parked")
    else:
        yield idle_at, Park(instance.id, "idle_timeout has passed")


def _snapshot(facts: Facts, snapshot: Snapshot, now: Moment) -> Iterator[tuple[float, Action]]:
    if facts.starting or any(i.busy for i in facts.instances):
        return
    deployment = facts.deployment
    if deployment is None or not facts.owned(snapshot):
        yield now.monotonic, DeleteSnapshot(snapshot.id, "its deployment is gone")
        return
    if deployment.deleting:
        yield now.monotonic, DeleteSnapshot(snapshot.id, "its deployment is being deleted")
        return

    def after(used: float) -> float:
        return now.monotonic + used + deployment.ttl_seconds - now.wall

    if snapshot.quarantined:
        yield after(snapshot.create_time), DeleteSnapshot(snapshot.id, "ttl has passed since its quarantine")
        return
    # A newer snapshot replaces this one only where the same nodes can restore it.
    newest = max(
        (
            s
            for s in facts.snapshots
            if facts.owned(s) and s.kind == snapshot.kind and not s.quarantined and facts.within_reach(s.node)
        ),
        key=lambda s: s.age_key,
    )
    if _unpublished(facts, deployment, snapshot) and newest.id == snapshot.id:
        yield now.monotonic, Publish(snapshot.id, "its deployment keeps snapshots in the object store")
    if newest.id != snapshot.id:
        yield now.monotonic, DeleteSnapshot(snapshot.id, f"snapshots/{newest.id} has replaced it")
    elif snapshot.unusable_since is not None:
        # The deployment's use does not count: it goes on without this snapshot.
        yield (
            after(snapshot.unusable_since),
            DeleteSnapshot(snapshot.id, "no node has been able to restore it for its ttl"),
        )
    elif not any(i.in_flight for i in facts.instances):
        used = max(snapshot.create_time, snapshot.adopt_time, facts.last_use)
        yield after(used), DeleteSnapshot(snapshot.id, "ttl has passed since its last use")


def _unpublished(facts: Facts, deployment: Deployment, snapshot: Snapshot) -> bool:
    return (
        deployment.checkpoint.storage is Storage.S3
        and snapshot.local
        and not snapshot.published
        and bool(facts.nodes[snapshot.node].object_store)
    )


def _deployment(facts: Facts, deployment: Deployment, now: Moment) -> Iterator[tuple[float, Action]]:
    if facts.starting:
        return

    def reachable(node: str) -> bool:
        return node in facts.nodes and facts.nodes[node].state is not NodeState.UNREACHABLE

    instances = [i for i in facts.instances if deployment.runs(i.report) and reachable(i.node)]
    if deployment.deleting:
        left = [s for s in facts.snapshots if facts.owned(s) and reachable(s.node)]
        if not instances and not left:
            yield now.monotonic, Forget(deployment.id, "nothing of it is left")
    elif (kept := deployment.kept_instances) and sum(
        i.state in _kept_states(deployment) for i in instances
    ) < kept:
        resident = "an instance is" if kept == 1 else f"{kept} instances are"
        yield now.monotonic, KeepWarm(deployment.id, f"{resident} to be resident")


def _kept_states(deployment: Deployment) -> frozenset[InstanceState]:
    """States of an instance that needs no other one in its place. A person may park a warm one."""
    warm = deployment.start_mode is StartMode.WARM
    return LIVE if warm else LIVE - {InstanceState.PARKED}

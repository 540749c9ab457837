"""What is to be parked, stopped, deleted or started now, and when to look again. Pure.

Rules yield (steady time at which it is due, action). What is not due yet only says when to wake.
Nothing that serves a request, starts or is being captured is ever touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

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
    }
)
STOPPABLE: Final = frozenset(
    {InstanceState.STARTING, InstanceState.SERVING, InstanceState.PARKED, InstanceState.FAILED}
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known.

    ``starting`` holds deployments that a start is running for or that a request waits for;
    ``last_use`` wall times by deployment; ``retry_at`` steady times by resource name, before which
    no action on it is tried again; ``silence`` seconds without a heartbeat that a node may have.
    """

    deployments: Mapping[str, Deployment] = field(default_factory=dict)
    instances: tuple[Instance, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    nodes: Mapping[str, Node] = field(default_factory=dict)
    last_use: Mapping[str, float] = field(default_factory=dict)
    starting: frozenset[str] = frozenset()
    retry_at: Mapping[str, float] = field(default_factory=dict)
    silence: float = 15.0


@dataclass(frozen=True, slots=True)
class OnInstance:
    instance: str
    reason: str

    @property
    def target(self) -> str:
        return f"instances/{self.instance}"


class Park(OnInstance):
    __slots__ = ()


class Stop(OnInstance):
    __slots__ = ()


@dataclass(frozen=True, slots=True)
class DeleteSnapshot:
    snapshot: str
    reason: str

    @property
    def target(self) -> str:
        return f"snapshots/{self.snapshot}"


@dataclass(frozen=True, slots=True)
class Publish:
    snapshot: str
    reason: str

    @property
    def target(self) -> str:
        # Not the snapshot alone: an upload under way must not put off deleting it.
        return f"snapshots/{self.snapshot}/upload"


@dataclass(frozen=True, slots=True)
class KeepWarm:
    deployment: str
    reason: str

    @property
    def target(self) -> str:
        # Not the deployment alone: waiting to restart it must not put off forgetting it.
        return f"deployments/{self.deployment}/instances"


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing is left of a deployment that was being deleted."""

    deployment: str
    reason: str

    @property
    def target(self) -> str:
        return f"deployments/{self.deployment}"


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A node has been silent for too long."""

    node: str
    reason: str

    @property
    def target(self) -> str:
        return f"nodes/{self.node}"


Action = Park | Stop | DeleteSnapshot | Publish | KeepWarm | Forget | GiveUp


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions due now, and the seconds until the next may be (None: nothing is foreseen)."""

    actions: tuple[Action, ...]
    wake_in: float | None


def plan(facts: Facts, now: Moment) -> Plan:
    """Everything that is due at ``now``."""
    actions: list[Action] = []
    next_at: float | None = None
    for due, action in _rules(facts, now):
        at = max(due, facts.retry_at.get(action.target, due))
        if at <= now.steady:
            actions.append(action)
        else:
            next_at = at if next_at is None else min(next_at, at)
    return Plan(tuple(actions), None if next_at is None else next_at - now.steady)


def _rules(facts: Facts, now: Moment) -> Iterator[tuple[float, Action]]:
    for node in facts.nodes.values():
        yield from _node(node, facts.silence)
    for instance in facts.instances:
        if _within_reach(facts, instance.node) and instance.deployment and not instance.busy:
            yield from _instance(facts, instance, now)
    for snapshot in facts.snapshots:
        # What only lies in the store and was made by another controller is not ours to delete.
        ours = snapshot.local or snapshot.ours
        if _within_reach(facts, snapshot.node) and snapshot.deployment and ours:
            yield from _snapshot(facts, snapshot, now)
    for deployment in facts.deployments.values():
        yield from _deployment(facts, deployment, now)


def _within_reach(facts: Facts, node: str) -> bool:
    return node in facts.nodes and facts.nodes[node].state is NodeState.READY


def _node(node: Node, silence: float) -> Iterator[tuple[float, Action]]:
    if node.state is NodeState.UNREACHABLE:
        return
    yield node.heartbeat_at + silence, GiveUp(node.id, "no heartbeat")
    if node.state is NodeState.CONNECTING:
        yield node.since + silence, GiveUp(node.id, "its snapshotd does not answer")


def _instance(facts: Facts, instance: Instance, now: Moment) -> Iterator[tuple[float, Action]]:
    if instance.in_flight or instance.deployment in facts.starting:
        return
    deployment = facts.deployments.get(instance.deployment)
    if deployment is None or deployment.deleting:
        if instance.state in STOPPABLE:
            yield now.steady, Stop(instance.id, "its deployment is gone")
    elif instance.state is InstanceState.FAILED:
        yield instance.since + FAILED_KEPT, Stop(instance.id, "it failed")
    elif instance.state is InstanceState.SERVING:
        yield from _serving(facts, instance, deployment, now)
    elif instance.state is InstanceState.PARKED and deployment.start_mode is not StartMode.WARM:
        yield instance.since + deployment.park_seconds, Stop(instance.id, "park_timeout has passed")


def _serving(
    facts: Facts, instance: Instance, deployment: Deployment, now: Moment
) -> Iterator[tuple[float, Action]]:
    idle_at = instance.idle_since + deployment.idle_seconds
    if deployment.start_mode is StartMode.COLD:
        yield idle_at, Stop(instance.id, "idle_timeout has passed")
    elif deployment.start_mode is StartMode.CHECKPOINT:
        if instance.park_refused:
            yield idle_at, Stop(instance.id, "idle_timeout has passed and it could not be parked")
        else:
            yield idle_at, Park(instance.id, "idle_timeout has passed")
    else:
        serving = [i for i in _instances_of(facts, deployment) if i.state is InstanceState.SERVING]
        oldest = min(serving, key=lambda i: (i.report.create_time, i.id))
        if instance.id != oldest.id:
            yield now.steady, Stop(instance.id, f"instances/{oldest.id} is kept warm already")


def _instances_of(facts: Facts, deployment: Deployment) -> list[Instance]:
    return [
        i
        for i in facts.instances
        if i.deployment == deployment.id and i.node in facts.nodes and _within_reach(facts, i.node)
    ]


def _snapshot(facts: Facts, snapshot: Snapshot, now: Moment) -> Iterator[tuple[float, Action]]:
    if snapshot.deployment in facts.starting:
        return
    users = [i for i in facts.instances if i.deployment == snapshot.deployment and (i.in_flight or i.busy)]
    if any(i.busy for i in users):
        return
    deployment = facts.deployments.get(snapshot.deployment)
    if deployment is None or deployment.deleting:
        yield now.steady, DeleteSnapshot(snapshot.id, "its deployment is gone")
        return

    def after(used: float) -> float:
        return now.steady + used + deployment.ttl_seconds - now.wall

    if snapshot.quarantined:
        yield after(snapshot.create_time), DeleteSnapshot(snapshot.id, "ttl has passed since its quarantine")
        return
    newest = max(
        (
            s
            for s in facts.snapshots
            if s.deployment == snapshot.deployment
            and (s.local or s.ours)
            and not s.quarantined
            and _within_reach(facts, s.node)
        ),
        key=lambda s: (s.create_time, s.id),
    )
    if _unpublished(facts, deployment, snapshot) and newest.id == snapshot.id:
        yield now.steady, Publish(snapshot.id, "its deployment keeps snapshots in the object store")
    if newest.id != snapshot.id:
        yield now.steady, DeleteSnapshot(snapshot.id, f"snapshots/{newest.id} has replaced it")
    elif not users:
        used = max(snapshot.create_time, facts.last_use.get(snapshot.deployment, 0.0))
        yield after(used), DeleteSnapshot(snapshot.id, "ttl has passed since its last use")


def _unpublished(facts: Facts, deployment: Deployment, snapshot: Snapshot) -> bool:
    return (
        deployment.checkpoint.storage is Storage.S3
        and snapshot.local
        and not snapshot.published
        and bool(facts.nodes[snapshot.node].object_store)
    )


def _deployment(facts: Facts, deployment: Deployment, now: Moment) -> Iterator[tuple[float, Action]]:
    if deployment.id in facts.starting:
        return

    def reachable(node: str) -> bool:
        return node in facts.nodes and facts.nodes[node].state is not NodeState.UNREACHABLE

    instances = [i for i in facts.instances if i.deployment == deployment.id and reachable(i.node)]
    if deployment.deleting:
        snapshots = [
            s
            for s in facts.snapshots
            if s.deployment == deployment.id and (s.local or s.ours) and reachable(s.node)
        ]
        if not instances and not snapshots:
            yield now.steady, Forget(deployment.id, "nothing of it is left")
    elif deployment.start_mode is StartMode.WARM and not any(i.state in LIVE for i in instances):
        yield now.steady, KeepWarm(deployment.id, "no instance is resident")

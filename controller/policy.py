"""How a deployment is started: facts in, a decision and its reason out. Nothing here waits or acts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controller import routing
from controller.model import (
    Deployment,
    Instance,
    InstanceState,
    Node,
    NodeState,
    Snapshot,
    StartMode,
    Storage,
    Tier,
)
from dumont.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when a start is decided.

    Args:
        deployment: the one to start.
        instances: its instances.
        snapshots: its snapshots, as each node sees them.
        nodes: all nodes by id.
        failed: names of resources with which this start has failed.
        capture_at: monotonic time before which no capture is attempted, because an earlier one failed.
        started_on: ids of the nodes on which the records show an instance of the deployment.
        captured_on: ids of the nodes on which the records show a snapshot of the deployment.
    """

    deployment: Deployment
    instances: tuple[Instance, ...]
    snapshots: tuple[Snapshot, ...]
    nodes: Mapping[str, Node]
    failed: frozenset[str] = frozenset()
    capture_at: float = 0.0
    started_on: frozenset[str] = frozenset()
    captured_on: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Attempt:
    """Attempt this tier. ``instance`` is set for resident and parked, ``snapshot`` for local and remote."""

    tier: Tier
    node: str
    reason: str
    instance: str = ""
    snapshot: str = ""
    capture: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Something is under way on ``instance``, or ``nodes`` are asked: decide again once one has settled.

    ``until`` is a monotonic time at which to decide again in any case.
    """

    reason: str
    tier: Tier | None = None
    instance: str = ""
    nodes: tuple[str, ...] = ()
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Full:
    """Instances serve, and none has room: wait until one has."""

    reason: str


# Seconds that a start waits for a node that may hold a snapshot and is being connected to.
CONNECT_PATIENCE = 2.0
# States that end by themselves, and the tier of a request that waits for their end.
JOINABLE = {
    InstanceState.STARTING: Tier.COLD,
    InstanceState.RESUMING: Tier.PARKED,
    InstanceState.CAPTURING: None,
    InstanceState.PARKING: None,
    InstanceState.MOVING: None,
}


def decide(facts: Facts, now: float) -> Attempt | Wait:
    """Choose the fastest tier that is available.

    Args:
        facts: what is known.
        now: monotonic time in seconds.

    Raises:
        Unavailable: NO_NODE, no node can take a cold start.
    """
    reachable = _reachable(facts)
    return (
        _resident(facts, reachable, now)
        or _join(reachable, (InstanceState.RESUMING,))
        or _parked(reachable)
        or _join(reachable, tuple(JOINABLE))
        or _unsure(facts, now)
        or _local(facts)
        or _remote(facts)
        or _cold(facts, now)
    )


def admit(facts: Facts, now: float, sequences: int) -> Attempt | Full | None:
    """The instance that a request may enter now; None: one must be started or captured first.

    Args:
        facts: what is known.
        now: monotonic time in seconds.
        sequences: how many the request takes.
    """
    resident = _resident(facts, _reachable(facts), now, sequences)
    if resident is None or resident.capture:
        return None
    instance = next(i for i in facts.instances if i.id == resident.instance)
    if not routing.has_room(instance, sequences):
        return Full(f"instances/{instance.id} was full")
    return resident


def _reachable(facts: Facts) -> list[Instance]:
    return [
        instance
        for instance in facts.instances
        if _ready(facts, instance.node)
        and not instance.draining
        and f"instances/{instance.id}" not in facts.failed
    ]


def _ready(facts: Facts, node: str) -> bool:
    return node in facts.nodes and facts.nodes[node].state is NodeState.READY


def _resident(facts: Facts, instances: list[Instance], now: float, sequences: int = 1) -> Attempt | None:
    serving = [i for i in instances if i.state is InstanceState.SERVING and not i.busy]
    # An instance that a prompt has entered is not captured any more, so one that has served is preferred.
    clean = _wants_capture(facts, now) and not any(i.served for i in serving)
    chosen = routing.choose(serving, sequences)
    if chosen is None:
        return None
    capture = (
        clean
        and chosen.in_flight == 0
        and chosen.report.weights is facts.deployment.checkpoint.weights
        and facts.nodes[chosen.node].checkpoint_capable
    )
    return Attempt(
        Tier.RESIDENT, chosen.node, f"instances/{chosen.id} is serving", instance=chosen.id, capture=capture
    )


def _parked(instances: list[Instance]) -> Attempt | None:
    parked = routing.choose(i for i in instances if i.state is InstanceState.PARKED)
    if parked is None:
        return None
    return Attempt(Tier.PARKED, parked.node, f"instances/{parked.id} is parked", instance=parked.id)


def _join(instances: list[Instance], states: tuple[InstanceState, ...]) -> Wait | None:
    for instance in instances:
        if instance.state in states:
            tier = JOINABLE[instance.state]
            if instance.state is InstanceState.STARTING and instance.report.snapshot:
                tier = Tier.LOCAL
            return Wait(
                f"instances/{instance.id} was found {instance.state.name.lower()}", tier, instance=instance.id
            )
    return None


def _unsure(facts: Facts, now: float) -> Wait | None:
    """Wait for nodes that are being asked what they hold, if they may hold something of this deployment."""
    asked = {
        node.id: node
        for node in facts.nodes.values()
        if node.state is NodeState.CONNECTING and f"nodes/{node.id}" not in facts.failed
    }
    if not asked:
        return None
    if not any(_ready(facts, node) and f"nodes/{node}" not in facts.failed for node in facts.nodes):
        return Wait(
            f"{_names(asked)} was asked what it holds, and no other node is ready", nodes=tuple(asked)
        )
    # One of them may hold an instance: a start now could be the deployment's second one.
    started = (facts.started_on | {i.node for i in facts.instances}) & asked.keys()
    if started:
        return Wait(f"{_names(started)} was asked which instances it holds", nodes=tuple(sorted(started)))
    if facts.deployment.start_mode is not StartMode.CHECKPOINT or _usable(facts):
        return None
    # A snapshot is worth a short wait, but not as long as it takes to give up on a dead node.
    captured = (facts.captured_on | {s.node for s in facts.snapshots if s.local}) & asked.keys()
    until = max((asked[node].since + CONNECT_PATIENCE for node in captured), default=now)
    if until <= now:
        return None
    reason = f"{_names(captured)} was asked which snapshots it holds"
    return Wait(reason, nodes=tuple(sorted(captured)), until=until)


def _names(nodes: Iterable[str]) -> str:
    return ", ".join(f"nodes/{node}" for node in sorted(nodes))


def usable(snapshot: Snapshot, nodes: Mapping[str, Node]) -> bool:
    """Whether the snapshot's node may restore it now, fetching it first if need be."""
    node = nodes.get(snapshot.node)
    return (
        (snapshot.local or snapshot.published)
        and not snapshot.orphan
        and not snapshot.quarantined
        and not snapshot.incompatibility
        and node is not None
        and node.state is NodeState.READY
        and node.checkpoint_capable
    )


def _usable(facts: Facts) -> list[Snapshot]:
    return [
        snapshot
        for snapshot in facts.snapshots
        if usable(snapshot, facts.nodes)
        and snapshot.weights is facts.deployment.checkpoint.weights
        and f"snapshots/{snapshot.id}" not in facts.failed
        and not (snapshot.local and f"snapshots/{snapshot.id} on nodes/{snapshot.node}" in facts.failed)
    ]


def _local(facts: Facts) -> Attempt | None:
    if facts.deployment.start_mode is not StartMode.CHECKPOINT:
        return None
    held = (snapshot for snapshot in _usable(facts) if snapshot.local)
    newest = max(held, key=lambda s: s.age_key, default=None)
    if newest is None:
        return None
    return Attempt(
        Tier.LOCAL, newest.node, f"snapshots/{newest.id} is on nodes/{newest.node}", snapshot=newest.id
    )


def _remote(facts: Facts) -> Attempt | None:
    if facts.deployment.start_mode is not StartMode.CHECKPOINT:
        return None
    published = [s for s in _usable(facts) if s.published and f"nodes/{s.node}" not in facts.failed]
    if not published:
        return None
    newest = max(published, key=lambda s: s.age_key).id
    within_reach = {s.node: facts.nodes[s.node] for s in published if s.id == newest}
    node = place(within_reach)
    return Attempt(Tier.REMOTE, node.id, f"snapshots/{newest} is in the object store", snapshot=newest)


def place(nodes: Mapping[str, Node], failed: frozenset[str] = frozenset(), publishing: bool = False) -> Node:
    """The ready node with the most free memory.

    Args:
        nodes: by id.
        failed: names of resources with which this start has failed.
        publishing: prefer nodes with an object store.

    Raises:
        Unavailable: NO_NODE, there is none.
    """
    ready = [n for n in nodes.values() if n.state is NodeState.READY and f"nodes/{n.id}" not in failed]
    if not ready:
        raise Unavailable(
            "NO_NODE",
            "no node is ready; start a snapshotd that registers here, or see dumont node ls",
            retry_after=1.0,
        )
    return min(
        ready,
        key=lambda n: (
            not n.checkpoint_capable,
            publishing and not n.object_store,
            -n.memory_available_bytes,
            n.id,
        ),
    )


def _cold(facts: Facts, now: float) -> Attempt:
    node = place(facts.nodes, facts.failed, publishing=facts.deployment.checkpoint.storage is Storage.S3)
    if facts.deployment.start_mode is StartMode.CHECKPOINT:
        reason = "no instance and no usable snapshot" + "".join(
            f"; snapshots/{snapshot.id} is quarantined on nodes/{snapshot.node}: {snapshot.quarantine_reason}"
            for snapshot in facts.snapshots
            if snapshot.quarantined
        )
        reason += "".join(
            f"; {snapshot.incompatibility}"
            for snapshot in facts.snapshots
            if snapshot.incompatibility and not snapshot.quarantined
        )
        wanted = facts.deployment.checkpoint.weights
        reason += "".join(
            f"; snapshots/{snapshot.id} has its weights {snapshot.weights.value}, not {wanted.value}"
            for snapshot in facts.snapshots
            if snapshot.weights is not wanted and not snapshot.quarantined and not snapshot.incompatibility
        )
        if not node.checkpoint_capable:
            missing = "; ".join(finding.message for finding in node.findings if not finding.passed)
            reason += f"; nodes/{node.id} cannot checkpoint: {missing or 'it does not say why'}"
    else:
        reason = f"no instance, and start mode {facts.deployment.start_mode.value} uses no snapshot"
    capture = node.checkpoint_capable and _wants_capture(facts, now)
    return Attempt(Tier.COLD, node.id, reason, capture=capture)


def _wants_capture(facts: Facts, now: float) -> bool:
    return (
        facts.deployment.start_mode is StartMode.CHECKPOINT
        and facts.deployment.checkpoint.enabled
        and now >= facts.capture_at
        and not _usable(facts)
    )

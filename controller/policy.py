"""How a deployment is started: facts in, a decision and its reason out. Nothing here waits or acts.

Of all starts that are possible, on every node and from every tier, the one is chosen that is estimated to
serve first, the time included in which other instances make room for it. A node with GPUs comes before one
without.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from controller import room, routing
from controller.estimates import Estimate, Estimates
from controller.model import (
    Deployment,
    Instance,
    InstanceState,
    Node,
    NodeState,
    Report,
    Snapshot,
    StartMode,
    Storage,
    Tier,
)
from controller.room import Need, NoRoom, Room, Tenant, Yield
from dumont import engines
from dumont.errors import DumontError, FailedPrecondition, ResourceExhausted, Unavailable

# Called with a node's id: the instances that take memory of it.
Tenants = Callable[[str], Sequence[Tenant]]


def nobody(node: str) -> Sequence[Tenant]:
    """No instance is on any node."""
    return ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when a start is decided.

    Args:
        deployment: the one to start.
        instances: its instances.
        snapshots: its snapshots, as each node sees them; read several times, or not at all.
        nodes: all nodes by id.
        failed: names of resources with which this start has failed.
        capture_at: monotonic time before which no capture is attempted, because an earlier one failed.
        started_on: ids of the nodes on which the records show an instance of the deployment.
        captured_on: ids of the nodes on which the records show a snapshot of the deployment.
        tenants: the instances of each node.
        estimates: of times and sizes.
        another: whether another instance is to be started beside those that serve.
    """

    deployment: Deployment
    instances: tuple[Instance, ...]
    snapshots: Iterable[Snapshot]
    nodes: Mapping[str, Node]
    failed: frozenset[str] = frozenset()
    capture_at: float = 0.0
    started_on: frozenset[str] = frozenset()
    captured_on: frozenset[str] = frozenset()
    tenants: Tenants = nobody
    estimates: Estimates = field(default_factory=Estimates)
    another: bool = False


@dataclass(frozen=True, slots=True)
class Attempt:
    """Attempt this tier. ``instance`` is set for resident and parked, ``snapshot`` for local and remote.

    ``gpu`` is the UUID of the GPU to use; empty: the node chooses. ``yields`` make room first. ``need`` is
    what the instance will take. ``seconds`` are the estimate, that of making room included.
    """

    tier: Tier
    node: str
    reason: str
    instance: str = ""
    snapshot: str = ""
    capture: bool = False
    gpu: str = ""
    yields: tuple[Yield, ...] = ()
    need: Need | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Wait:
    """Something is under way on ``instance``, or ``nodes`` are asked: decide again once one has settled.

    ``until`` is a monotonic time at which to decide again in any case. ``room``: no node has room now; decide
    again once memory has become free anywhere.
    """

    reason: str
    tier: Tier | None = None
    instance: str = ""
    nodes: tuple[str, ...] = ()
    until: float | None = None
    room: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible start. ``gpu_node`` says whether it would use a GPU.

    ``start`` is the estimate of the start itself; ``room`` is None until it was looked for.
    """

    tier: Tier
    node: str
    start: Estimate
    need: Need
    gpu_node: bool = False
    instance: str = ""
    snapshot: str = ""
    room: Room | NoRoom | None = None
    # Other starts under way on the node.
    beside: int = 0

    @property
    def seconds(self) -> float:
        """Until it serves, the time of making room included."""
        start = self.start.seconds * (1.0 + BESIDE * self.beside)
        return start + (self.room.seconds if isinstance(self.room, Room) else 0.0)


@dataclass(frozen=True, slots=True)
class Full:
    """Instances serve, and none has room: wait until one has."""

    reason: str


# What each other start under way on a node adds to a start there, as a share of it.
BESIDE: Final = 0.5
# Seconds that a start waits for a node that may hold a snapshot and is being connected to.
CONNECT_PATIENCE: Final = 2.0
# Seconds after which a start that waits for room looks again in any case.
ROOM_AGAIN: Final = 1.0
# Nodes without free memory on which one decision looks for instances that could make room.
ROOMS_EXAMINED: Final = 8
# Another instance is started once a request has waited for so many seconds, or once all instances have been
# asked for such a share of their capacity for so long.
QUEUE_SECONDS: Final = 1.0
LOAD_SHARE: Final = 0.8
LOAD_SECONDS: Final = 10.0
# States of instances that count for how many there may be.
BESIDES: Final = frozenset(
    {
        InstanceState.STARTING,
        InstanceState.SERVING,
        InstanceState.CAPTURING,
        InstanceState.RESUMING,
        InstanceState.MOVING,
    }
)
# States that end by themselves, and the tier of a request that waits for their end.
JOINABLE = {
    InstanceState.STARTING: Tier.COLD,
    InstanceState.RESUMING: Tier.PARKED,
    InstanceState.CAPTURING: None,
    InstanceState.PARKING: None,
    InstanceState.MOVING: None,
}


def decide(facts: Facts, now: float) -> Attempt | Wait:
    """Choose the start that is estimated to serve first.

    Args:
        facts: what is known.
        now: monotonic time in seconds.

    Raises:
        Unavailable: NO_NODE, no node can take a cold start.
        FailedPrecondition: ENGINE_NOT_INSTALLED, no ready node has the deployment's engine.
        ResourceExhausted: NO_ROOM, it is too large for every node.
    """
    reachable = _reachable(facts)
    if facts.another:
        # It joins nothing: those that start now were counted when it was decided to start another.
        return _cheapest(facts, reachable, now)
    waited = _resident(facts, reachable, now) or _join(reachable, (InstanceState.RESUMING,))
    if waited is not None:
        return waited
    if any(instance.state is InstanceState.PARKED for instance in reachable):
        cheapest = _cheapest(facts, reachable, now)
        if isinstance(cheapest, Attempt) and cheapest.tier is Tier.PARKED:
            return cheapest
    return _join(reachable, tuple(JOINABLE)) or _unsure(facts, now) or _cheapest(facts, reachable, now)


def explain(facts: Facts, now: float) -> list[Candidate]:
    """Every possible start, each with its room or why there is none; the one that would be chosen first."""
    found = [
        _examined(facts, _candidate(facts, tier, entry[-1]), now)
        for tier in (Tier.PARKED, Tier.LOCAL, Tier.REMOTE, Tier.COLD)
        for entry in _entries(facts, _reachable(facts), tier)
    ]
    return sorted(found, key=lambda c: (not isinstance(c.room, Room), _rank(c), c.node))


def _cheapest(facts: Facts, reachable: list[Instance], now: float) -> Attempt | Wait:
    best: Candidate | None = None
    refusals: list[NoRoom] = []
    gpus = any(node.gpus and node.takes_starts for node in facts.nodes.values())
    for tier in (Tier.PARKED, Tier.LOCAL, Tier.REMOTE, Tier.COLD):
        least = facts.estimates.least(facts.deployment.id, tier, _least_bytes(facts, tier))
        final = best is not None and (best.gpu_node or not gpus or best.tier is Tier.PARKED)
        if best is not None and final and least >= best.seconds:
            # Nothing in this tier can be faster: its nodes need not even be looked at.
            continue
        best = _best_of(facts, tier, _entries(facts, reachable, tier), best, refusals, now)
    if best is not None:
        return _attempt(facts, best, now)
    if not refusals:
        raise _no_node(facts.nodes, facts.deployment.engine)
    if all(refusal.never for refusal in refusals):
        raise ResourceExhausted(
            "NO_ROOM",
            f"deployments/{facts.deployment.id} fits on no node: {refusals[0].reason}; use a smaller "
            "model, or a node with more memory",
            metadata={"deployment": f"deployments/{facts.deployment.id}"},
        )
    why = next(refusal.reason for refusal in refusals if not refusal.never)
    return Wait(f"no node has room: {why}", until=now + ROOM_AGAIN, room=True)


def _best_of(
    facts: Facts,
    tier: Tier,
    entries: list[_Entry],
    best: Candidate | None,
    refusals: list[NoRoom],
    now: float,
) -> Candidate | None:
    """The best of ``best`` and the possible starts from a tier.

    Room is looked for in the order of their estimates, and no longer than another one can still be better.
    """
    heapq.heapify(entries)
    crowded = 0
    while entries:
        on_cpu, seconds, _, _, what = heapq.heappop(entries)
        if best is not None and (on_cpu, seconds) >= _rank(best):
            break
        candidate = _examined(facts, _candidate(facts, tier, what), now)
        found = candidate.room
        if isinstance(found, NoRoom):
            refusals.append(found)
        elif best is None or _rank(candidate) < _rank(best):
            best = candidate
        crowded += isinstance(found, NoRoom) or bool(found and found.yields)
        if crowded == ROOMS_EXAMINED:
            entries = _spacious(entries, candidate.need)
    return best


def _spacious(entries: list[_Entry], need: Need) -> list[_Entry]:
    """Those on nodes that say that they have the memory, so that nobody would have to make room."""
    left = [entry for entry in entries if -entry[2] >= (need.ram_bytes if entry[0] else need.gpu_bytes)]
    heapq.heapify(left)
    return left


def _rank(candidate: Candidate) -> tuple[bool, float]:
    # A parked instance is where it is. Anything else goes to a GPU while there is one with room.
    return not (candidate.gpu_node or candidate.tier is Tier.PARKED), candidate.seconds


def _spare(node: Node) -> int:
    """What a node said was free, of its GPUs if it has some."""
    gpus = node.gpus
    if not gpus:
        return node.memory_available_bytes
    return gpus[0].free_bytes if len(gpus) == 1 else max(gpu.free_bytes for gpu in gpus)


def _examined(facts: Facts, candidate: Candidate, now: float) -> Candidate:
    node, tenants = facts.nodes[candidate.node], facts.tenants(candidate.node)
    beside = sum(tenant.instance.state is InstanceState.STARTING for tenant in tenants)
    return replace(candidate, room=room.find(node, tenants, candidate.need, now), beside=beside)


def _attempt(facts: Facts, best: Candidate, now: float) -> Attempt:
    assert isinstance(best.room, Room)
    reason = _why(facts, best)
    node = facts.nodes[best.node]
    reason += "".join(f"; {one.reason}" for one in best.room.yields)
    capture = best.tier is Tier.COLD and node.checkpoint_capable and _wants_capture(facts, now)
    return Attempt(
        best.tier,
        best.node,
        reason,
        instance=best.instance,
        snapshot=best.snapshot,
        capture=capture,
        # A divided GPU has parts that only the node knows.
        gpu=best.room.gpu if node.checkpoint_capable else "",
        yields=best.room.yields,
        need=replace(best.need, gpu=best.room.gpu),
        seconds=best.seconds,
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


def wants_another(facts: Facts, now: float, arrived: float | None, loaded_since: float | None) -> str:
    """Why another instance should be started beside those that serve; empty: none should, or none may.

    Args:
        facts: what is known.
        now: monotonic time in seconds.
        arrived: when the next request in the queue arrived; None: none waits.
        loaded_since: since when every instance has been nearly full; None: one is not.
    """
    instances = [i for i in _reachable(facts) if i.state in BESIDES]
    serving = [i for i in instances if i.state is InstanceState.SERVING and not i.busy]
    if not serving or len(instances) >= facts.deployment.most_instances:
        return ""
    # The time in which an instance was started is no reason to start another.
    begun = max(instance.since for instance in serving)
    if arrived is not None and now - max(arrived, begun) >= QUEUE_SECONDS:
        return f"a request has waited for {now - arrived:.1f} s for one of the instances that serve"
    if loaded_since is not None and now - max(loaded_since, begun) >= LOAD_SECONDS:
        return f"every instance has computed {LOAD_SHARE:.0%} of what it can at once, or more"
    return ""


def loaded(serving: Iterable[Instance]) -> bool:
    """Whether every one of the instances that serve is nearly full; False if there is none."""
    return min((routing.share(instance) for instance in serving), default=0.0) >= LOAD_SHARE


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


def _open(facts: Facts, node: str) -> bool:
    """Whether a start may be attempted on a node."""
    return node in facts.nodes and facts.nodes[node].takes_starts and f"nodes/{node}" not in facts.failed


def _resident(facts: Facts, instances: list[Instance], now: float, sequences: int = 1) -> Attempt | None:
    serving = [i for i in instances if i.state is InstanceState.SERVING and not i.busy]
    # An instance that a prompt has entered is not captured any more, so one that has served is preferred.
    clean = not any(i.served for i in serving) and _wants_capture(facts, now)
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
    if not any(_open(facts, node) for node in facts.nodes):
        return Wait(
            f"{_names(asked)} was asked what it holds, and no other node is ready", nodes=tuple(asked)
        )
    # One of them may hold an instance: a start now could be the deployment's second one.
    started = (facts.started_on | {i.node for i in facts.instances}) & asked.keys()
    if started:
        return Wait(f"{_names(started)} was asked which instances it holds", nodes=tuple(sorted(started)))
    if facts.deployment.start_mode is not StartMode.CHECKPOINT or _restorable(facts):
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
    # Asked for each of many nodes, so without the properties that say the same.
    if snapshot.owner is None or snapshot.quarantined or snapshot.incompatibility:
        return False
    node = nodes.get(snapshot.node)
    return (
        node is not None
        and node.state is NodeState.READY
        and not node.draining
        and node.checkpoint_capable
        and (snapshot.local or snapshot.published)
    )


def _usable(facts: Facts, local: bool | None = None) -> Iterator[Snapshot]:
    """The copies that may be restored now; ``local``: of these, only what its node holds, or does not."""
    checkpoint, options, failed = facts.deployment.checkpoint, facts.deployment.engine_options, facts.failed
    for copy in facts.snapshots:
        if local is not None and copy.local is not local:
            continue
        if copy.weights is not checkpoint.weights or copy.engine_options != options:
            continue
        if not usable(copy, facts.nodes):
            continue
        if failed and (
            f"snapshots/{copy.id}" in failed
            or (copy.local and f"snapshots/{copy.id} on nodes/{copy.node}" in failed)
        ):
            continue
        yield copy


def _restorable(facts: Facts) -> bool:
    return next(_usable(facts), None) is not None


# A possible start before its room is looked for, in the order in which they are: whether it would use no GPU,
# the estimated seconds, the free memory of its node (less is later), its place in the list, and what it is.
_Entry = tuple[bool, float, int, int, Instance | Snapshot | Node]


def _entries(facts: Facts, reachable: list[Instance], tier: Tier) -> list[_Entry]:
    """The possible starts from a tier. Each of many nodes may have one, so each costs little here."""
    if tier is Tier.PARKED:
        return _parked(facts, reachable)
    if tier is Tier.COLD:
        return _colds(facts)
    return _restores(facts, tier) if facts.deployment.start_mode is StartMode.CHECKPOINT else []


def _parked(facts: Facts, reachable: list[Instance]) -> list[_Entry]:
    return [
        # It is where it is.
        (
            False,
            facts.estimates.start(
                facts.deployment.id, i.node, Tier.PARKED, _resumed_bytes(facts.deployment, i.report)
            ).seconds,
            0,
            number,
            i,
        )
        for number, i in enumerate(reachable)
        if i.state is InstanceState.PARKED and not i.busy and not facts.nodes[i.node].draining
    ]


def _resumed_bytes(deployment: Deployment, report: Report) -> int:
    """What comes back to a GPU: the weights, and not its KV cache, if it is known how large they are."""
    return deployment.weights_bytes or report.gpu_bytes


def _restores(facts: Facts, tier: Tier) -> list[_Entry]:
    newest: dict[str, Snapshot] = {}
    for copy in _usable(facts, local=tier is Tier.LOCAL):
        if not facts.failed or f"nodes/{copy.node}" not in facts.failed:
            known = newest.get(copy.node)
            if known is None or known.age_key < copy.age_key:
                newest[copy.node] = copy
    if not newest:
        return []
    distinct = {copy.id: copy for copy in newest.values()}
    last = max(distinct.values(), key=lambda copy: copy.age_key)
    if tier is Tier.REMOTE and len(distinct) > 1:
        # Fetching an older one would be of no further use.
        newest = {node: copy for node, copy in newest.items() if copy.id == last.id}
    on_gpu = {copy.id: _uses_gpu(copy) for copy in distinct.values()}
    seconds = facts.estimates.timer(facts.deployment.id, tier, last.size_bytes)
    entries: list[_Entry] = []
    for number, (name, copy) in enumerate(newest.items()):
        node = facts.nodes[name]
        if tier is Tier.LOCAL or _fits_disk(node, copy):
            on_cpu = not (node.gpus and on_gpu[copy.id])
            entries.append((on_cpu, seconds(name), -_spare(node), number, copy))
    return entries


def _uses_gpu(copy: Snapshot) -> bool:
    """Whether a snapshot is restored to a GPU where there is one; an earlier snapshotd does not say."""
    return copy.device.startswith("cuda") or not copy.device


def _fits_disk(node: Node, copy: Snapshot) -> bool:
    # What is in the object store too leaves the disk for it.
    limit = node.snapshot_limit_bytes
    return (not limit or copy.size_bytes <= limit) and (
        not node.disk_free_bytes or copy.size_bytes <= node.disk_free_bytes
    )


def _colds(facts: Facts) -> list[_Entry]:
    deployment, failed = facts.deployment, facts.failed
    seconds = facts.estimates.timer(deployment.id, Tier.COLD, deployment.weights_bytes)
    ready = [
        node
        for name, node in facts.nodes.items()
        if node.state is NodeState.READY
        and not node.draining
        and not (failed and f"nodes/{name}" in failed)
        and engines.runs(deployment.engine, node.engines)
    ]
    return [
        (not node.gpus, seconds(node.id), -_spare(node), number, node)
        for number, node in enumerate(_preferred(ready, deployment))
    ]


def _preferred(ready: list[Node], deployment: Deployment) -> list[Node]:
    """The nodes where a cold start is worth most: where it can be captured and published, if it will be."""
    if deployment.checkpoint.enabled:
        ready = [node for node in ready if node.checkpoint_capable] or ready
        if deployment.checkpoint.storage is Storage.S3:
            ready = [node for node in ready if node.object_store] or ready
    return ready


def _candidate(facts: Facts, tier: Tier, what: Instance | Snapshot | Node) -> Candidate:
    """All about a possible start but its room."""
    deployment, estimates = facts.deployment, facts.estimates
    size = estimates.size(deployment.id)
    need = Need(deployment.id, deployment.priority)
    if isinstance(what, Instance):
        report = what.report
        gpu_bytes = report.gpu_bytes if report.gpu else 0
        need = replace(need, gpu_bytes=gpu_bytes, home=report.gpu, instance=what.id)
        start = estimates.start(deployment.id, what.node, tier, _resumed_bytes(deployment, report))
        return Candidate(tier, what.node, start, need, bool(report.gpu), instance=what.id)
    if isinstance(what, Snapshot):
        gpu = bool(facts.nodes[what.node].gpus) and _uses_gpu(what)
        gpu_bytes = (what.gpu_bytes or size.gpu_bytes) if gpu else 0
        need = replace(need, gpu_bytes=gpu_bytes, ram_bytes=size.ram_bytes or what.size_bytes)
        start = estimates.start(deployment.id, what.node, tier, what.size_bytes)
        return Candidate(tier, what.node, start, need, gpu, snapshot=what.id)
    if what.gpus:
        largest = max(gpu.total_bytes - gpu.other_bytes for gpu in what.gpus)
        need = replace(need, gpu_bytes=estimates.gpu_bytes(deployment.id, largest), ram_bytes=size.ram_bytes)
    else:
        need = replace(need, ram_bytes=estimates.ram_bytes(deployment.id))
    start = estimates.start(deployment.id, what.id, tier, deployment.weights_bytes)
    return Candidate(tier, what.id, start, need, bool(what.gpus))


def _least_bytes(facts: Facts, tier: Tier) -> int:
    if tier is Tier.COLD:
        return facts.deployment.weights_bytes
    return min((snapshot.size_bytes for snapshot in facts.snapshots), default=0)


def _no_node(nodes: Mapping[str, Node], engine: str) -> DumontError:
    """Why no node can take a start."""
    ready = [node for node in nodes.values() if node.state is NodeState.READY]
    if ready and not any(engines.runs(engine, node.engines) for node in nodes.values()):
        return FailedPrecondition(
            "ENGINE_NOT_INSTALLED",
            f"none of the {len(ready)} ready nodes has the engine {engine}; run 'dumont engine install "
            f"{engine}' on one and start its snapshotd again, or see dumont node ls",
            field="engine",
            metadata={"engine": engine},
        )
    if ready and not any(engines.runs(engine, node.engines) for node in ready):
        return Unavailable(
            "NO_NODE",
            f"no node that has the engine {engine} is ready; see dumont node ls",
            metadata={"engine": engine},
            retry_after=1.0,
        )
    drained = any(node.draining for node in nodes.values())
    wanted, remedy = (" and takes starts", "undrain one") if drained else ("", "see dumont node ls")
    return Unavailable(
        "NO_NODE",
        f"no node is ready{wanted}; start a snapshotd that registers here, or {remedy}",
        retry_after=1.0,
    )


def place(
    nodes: Mapping[str, Node],
    failed: frozenset[str] = frozenset(),
    publishing: bool = False,
    engine: str = "",
) -> Node:
    """The ready node with the most free memory, of GPUs if any node has GPUs.

    Args:
        nodes: by id.
        failed: names of resources with which this start has failed.
        publishing: prefer nodes with an object store.
        engine: that the node must have.

    Raises:
        Unavailable: NO_NODE, there is none.
        FailedPrecondition: ENGINE_NOT_INSTALLED, no ready one has the engine.
    """
    ready = [
        n
        for n in nodes.values()
        if n.takes_starts and f"nodes/{n.id}" not in failed and engines.runs(engine, n.engines)
    ]
    if not ready:
        raise _no_node(nodes, engine)
    return min(
        ready,
        key=lambda n: (
            not n.checkpoint_capable,
            publishing and not n.object_store,
            not n.gpus,
            -_spare(n),
            n.id,
        ),
    )


def _why(facts: Facts, best: Candidate) -> str:
    """Why it is this tier: what it starts from, or what keeps it from a faster one."""
    if best.tier is Tier.PARKED:
        return f"instances/{best.instance} is parked"
    if best.tier is Tier.LOCAL:
        return f"snapshots/{best.snapshot} is on nodes/{best.node}"
    if best.tier is Tier.REMOTE:
        return f"snapshots/{best.snapshot} is in the object store"
    deployment, node = facts.deployment, facts.nodes[best.node]
    if deployment.start_mode is not StartMode.CHECKPOINT:
        return f"no instance, and start mode {deployment.start_mode.value} uses no snapshot"
    reason = "no instance and no usable snapshot"
    wanted = deployment.checkpoint.weights
    for snapshot in facts.snapshots:
        if snapshot.quarantined:
            reason += (
                f"; snapshots/{snapshot.id} is quarantined on nodes/{snapshot.node}: "
                f"{snapshot.quarantine_reason}"
            )
        elif snapshot.incompatibility:
            reason += f"; {snapshot.incompatibility}"
        elif snapshot.weights is not wanted:
            reason += (
                f"; snapshots/{snapshot.id} has its weights {snapshot.weights.value}, not {wanted.value}"
            )
        elif snapshot.engine_options != deployment.engine_options:
            reason += f"; snapshots/{snapshot.id} was captured with other engine options"
    if not node.checkpoint_capable:
        missing = "; ".join(finding.message for finding in node.findings if not finding.passed)
        reason += f"; nodes/{node.id} cannot checkpoint: {missing or 'it does not say why'}"
    return reason


def _wants_capture(facts: Facts, now: float) -> bool:
    return (
        facts.deployment.start_mode is StartMode.CHECKPOINT
        and facts.deployment.checkpoint.enabled
        and now >= facts.capture_at
        and not _restorable(facts)
    )

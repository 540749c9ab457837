"""How an instance can be brought to another node: facts in, a way or a refusal out. Pure.

A prompt must never enter a snapshot, so what goes to the other node is not the memory of the instance but its
deployment's snapshot, made before any prompt. The prompts in flight are answered where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controller import policy
from controller.model import Deployment, Instance, InstanceState, Node, NodeState, Snapshot
from dumont.errors import FailedPrecondition, Unavailable


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when an instance is to be brought to another node.

    Args:
        deployment: whose instance it is.
        instance: the source.
        target: the node to bring it to.
        nodes: all nodes by id.
        snapshots: the deployment's snapshots, as each node sees them.
        cold: whether the model may be loaded again there if no snapshot can be brought.
    """

    deployment: Deployment
    instance: Instance
    target: Node
    nodes: Mapping[str, Node]
    snapshots: tuple[Snapshot, ...]
    cold: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """How the target gets an instance.

    Args:
        snapshot: the snapshot to restore there; empty: none yet, or the model is loaded.
        publish: upload the snapshot first, from the node that holds it.
        capture: capture the source first; its snapshot is published and restored.
        reason: why this way, for a person.
    """

    reason: str
    snapshot: str = ""
    publish: bool = False
    capture: bool = False


def find(facts: Facts) -> Way:
    """The cheapest way: a snapshot that the target can restore, one elsewhere, a new one, or a cold start.

    Raises:
        FailedPrecondition: why there is none, and what would make one.
        Unavailable: NODE_UNAVAILABLE, the target does not answer.
    """
    check_target(facts.target)
    restorable = [
        snapshot
        for snapshot in facts.snapshots
        if snapshot.node == facts.target.id
        and policy.usable(snapshot, facts.nodes)
        and snapshot.weights is facts.deployment.checkpoint.weights
    ]
    if restorable:
        best = max(restorable, key=lambda s: (s.local, s.age_key))
        where = f"is on nodes/{best.node}" if best.local else "is in the object store"
        return Way(f"snapshots/{best.id} {where}", best.id)
    refusal = _unreachable(facts)
    if refusal is None:
        unpublished = max(_publishable(facts), key=lambda s: s.age_key, default=None)
        if unpublished is not None:
            reason = f"snapshots/{unpublished.id} is on nodes/{unpublished.node} and can be published"
            return Way(reason, unpublished.id, publish=True)
        refusal = _uncapturable(facts)
        if refusal is None:
            return Way("the deployment has no snapshot, and this instance can be captured", capture=True)
    if facts.cold:
        return Way(f"the model is loaded again: {refusal.message}")
    raise FailedPrecondition(
        refusal.reason,
        f"{refusal.message}; or allow a cold start there (--cold)",
        metadata=refusal.metadata,
    )


def check_target(target: Node) -> None:
    """Raise unless instances may be brought to a node.

    Raises:
        Unavailable: NODE_UNAVAILABLE, it does not answer.
        FailedPrecondition: NODE_DRAINING.
    """
    if target.draining:
        raise FailedPrecondition(
            "NODE_DRAINING",
            f"nodes/{target.id} is being drained and takes no instances; undrain it, or name another node",
            metadata={"node": f"nodes/{target.id}"},
        )
    if target.state is not NodeState.READY:
        raise Unavailable(
            "NODE_UNAVAILABLE",
            f"nodes/{target.id} is {target.state.name.lower()}; try again later, or name another node",
            metadata={"node": f"nodes/{target.id}"},
            retry_after=1.0,
        )


def _publishable(facts: Facts) -> Iterable[Snapshot]:
    return (
        snapshot
        for snapshot in facts.snapshots
        if snapshot.local
        and not snapshot.orphan
        and not snapshot.quarantined
        and facts.nodes[snapshot.node].state is NodeState.READY
        and snapshot.weights is facts.deployment.checkpoint.weights
        and facts.nodes[snapshot.node].object_store == facts.target.object_store
        # Its view of the store may say already that it cannot restore it.
        and not any(s.id == snapshot.id and s.incompatibility for s in facts.snapshots)
    )


def _unreachable(facts: Facts) -> FailedPrecondition | None:
    """Why no snapshot can be brought to the target at all; None: one can."""
    source, target = facts.nodes[facts.instance.node], facts.target
    metadata = {"node": f"nodes/{target.id}"}
    if not target.checkpoint_capable:
        missing = "; ".join(finding.message for finding in target.findings if not finding.passed)
        return FailedPrecondition(
            "NODE_NOT_CAPABLE",
            f"nodes/{target.id} cannot restore snapshots: {missing or 'it does not say why'}",
            metadata=metadata,
        )
    different = next((s for s in facts.snapshots if s.node == target.id and s.incompatibility), None)
    if different is not None:
        return FailedPrecondition(
            "INCOMPATIBLE", f"{different.incompatibility}; choose a node of the same kind", metadata=metadata
        )
    if not target.object_store or source.object_store != target.object_store:
        return FailedPrecondition(
            "NO_SHARED_STORE",
            f"nodes/{source.id} and nodes/{target.id} share no object store, through which a snapshot could "
            "go; start both snapshotd with the same --store-url",
            metadata=metadata,
        )
    return None


def _uncapturable(facts: Facts) -> FailedPrecondition | None:
    """Why the source cannot be captured; None: it can."""
    deployment, instance = facts.deployment, facts.instance
    metadata = {"deployment": f"deployments/{deployment.id}", "instance": f"instances/{instance.id}"}
    if not deployment.checkpoint.enabled:
        return FailedPrecondition(
            "CHECKPOINT_DISABLED",
            f"deployments/{deployment.id} has no snapshot and must not be captured; set "
            "deployment.checkpoint.enabled",
            metadata=metadata,
        )
    if not facts.nodes[instance.node].checkpoint_capable:
        return FailedPrecondition(
            "NODE_NOT_CAPABLE",
            f"deployments/{deployment.id} has no snapshot, and nodes/{instance.node} cannot make one",
            metadata=metadata,
        )
    if instance.served:
        return FailedPrecondition(
            "INSTANCE_SERVED",
            f"deployments/{deployment.id} has no snapshot that suits, and instances/{instance.id} cannot be "
            "captured any more, because prompts have entered it; make one with dumont snapshot create",
            metadata=metadata,
        )
    if instance.state is not InstanceState.SERVING:
        return FailedPrecondition(
            "INSTANCE_NOT_SERVING",
            f"deployments/{deployment.id} has no snapshot, and instances/{instance.id} is "
            f"{instance.state.name.lower()}, so it cannot be captured; resume it first",
            metadata=metadata,
        )
    if instance.report.weights is not deployment.checkpoint.weights:
        return FailedPrecondition(
            "WEIGHTS_DIFFER",
            f"instances/{instance.id} has its weights {instance.report.weights.value}, and snapshots of "
            f"deployments/{deployment.id} are to have them {deployment.checkpoint.weights.value}; stop it",
            metadata=metadata,
        )
    return None

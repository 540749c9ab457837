"""Where instances should be instead: off a node that is being drained. Facts in, actions out. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from controller.expiry import Action, Evacuate, Publish, Stop
from controller.model import Instance, InstanceState, Node, NodeState, Snapshot

# Instances that leave a node at a time: each takes memory and bandwidth at both ends.
EVACUATIONS: Final = 4
LEAVING: Final = (InstanceState.SERVING, InstanceState.PARKED)


@dataclass(frozen=True, slots=True)
class Remainder:
    """An instance that is still on a draining node, and why: a stable reason and a sentence."""

    instance: str
    deployment: str
    reason: str
    message: str


def plan_drain(
    node: Node,
    instances: Sequence[Instance],
    held: Sequence[Snapshot],
    owned: Container[str],
    retry_at: Mapping[str, float],
    now: float,
) -> tuple[Action, ...]:
    """Bring what is on a draining node to others, a few instances at a time.

    Args:
        node: the node.
        instances: those on it.
        held: the snapshots that it holds.
        owned: the ids of the instances that belong to a deployment; others are left alone.
        retry_at: monotonic times by target, before which no action on it begins; infinite: it is under way.
        now: monotonic time in seconds.
    """
    if not node.draining or node.state is not NodeState.READY:
        return ()
    evacuations = [
        Evacuate(i.id, f"nodes/{node.id} is being drained") for i in instances if _leaves(i, owned)
    ]
    begun = sum(retry_at.get(action.target, 0.0) == float("inf") for action in evacuations)
    due = [action for action in evacuations if retry_at.get(action.target, 0.0) <= now]
    others: list[Action] = [
        Stop(i.id, "it failed, and its node is being drained")
        for i in instances
        if i.state is InstanceState.FAILED and not i.busy and i.id in owned
    ]
    others += [
        Publish(snapshot.id, f"nodes/{node.id}, which holds it, is being drained")
        for snapshot in held
        if node.object_store
        and not (snapshot.published or snapshot.orphan or snapshot.quarantined or snapshot.incompatibility)
    ]
    ready = [action for action in others if retry_at.get(action.target, 0.0) <= now]
    return (*due[: max(0, EVACUATIONS - begun)], *ready)


def remainder(
    instances: Sequence[Instance], owned: Container[str], refused: Mapping[str, tuple[str, str]]
) -> tuple[Remainder, ...]:
    """What is on a draining node, and why.

    Args:
        instances: those on it.
        owned: as in ``plan_drain``.
        refused: reason and message by instance, where bringing it elsewhere has failed.
    """
    return tuple(Remainder(i.id, i.deployment, *_why(i, owned, refused)) for i in instances)


def _leaves(instance: Instance, owned: Container[str]) -> bool:
    return instance.state in LEAVING and not instance.busy and not instance.draining and instance.id in owned


def _why(
    instance: Instance, owned: Container[str], refused: Mapping[str, tuple[str, str]]
) -> tuple[str, str]:
    if instance.id not in owned:
        return "ORPHAN", "it is no deployment's of this controller, and is left alone; stop it by hand"
    if instance.in_flight:
        answers = f"it answers {instance.in_flight} requests and ends after them"
        return "INSTANCE_BUSY", answers
    if instance.id in refused:
        return refused[instance.id]
    return "UNDER_WAY", f"it is {instance.state.name.lower()} and is being brought elsewhere"

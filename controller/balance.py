"""Where instances should be instead: off a node that is drained, or off a crowded GPU. Facts in, actions out.

An instance that answers nothing is brought from a crowded GPU to an emptier one of its node, so that there is
room for whoever comes next on either. Two GPUs may differ by ``TOLERATED`` of their memory, and a move must
make the difference smaller by at least ``WORTH``: nothing moves to and fro. From a node that is full an idle
instance goes to one that is half empty.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from controller.expiry import Action, Evacuate, Publish, Rebalance, Stop
from controller.model import Gpu, Instance, InstanceState, Node, NodeState, Snapshot
from controller.room import held_bytes

# Instances that leave a node at a time: each takes memory and bandwidth at both ends.
EVACUATIONS: Final = 4
# Shares of a GPU's memory by which the fullest and the emptiest GPU of a node may differ, and by which a move
# must make them differ less.
TOLERATED: Final = 0.1
WORTH: Final = 0.05
# Of all GPUs of a node: above the one, idle instances leave it for nodes that are below the other.
FULL: Final = 0.9
HALF_EMPTY: Final = 0.5
# Seconds without a request after which an instance may be moved for the sake of balance.
IDLE: Final = 10.0
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


def plan_balance(
    node: Node,
    instances: Sequence[Instance],
    owned: Container[str],
    others: Callable[[], Iterable[tuple[Node, int]]],
    now: float,
) -> Rebalance | None:
    """The move that makes the GPUs of a node, or of two nodes, most alike; None: there is none worth it.

    Args:
        node: the node.
        instances: those on it.
        owned: as in ``plan_drain``.
        others: the other nodes that take starts, and the bytes that instances hold on their GPUs. Called only
            if this node is full.
        now: monotonic time in seconds.
    """
    if not node.takes_starts or not node.checkpoint_capable or not node.gpus:
        return None
    used = {gpu.uuid: _used(gpu, instances) for gpu in node.gpus}
    idle = [i for i in instances if _may_move(i, owned, now)]
    return _within(node, used, idle) or _away(node, used, idle, others)


def _within(node: Node, used: Mapping[str, int], idle: Sequence[Instance]) -> Rebalance | None:
    found: list[tuple[float, int, str, Instance, Gpu, Gpu]] = []
    for source in node.gpus:
        for target in node.gpus:
            difference = used[source.uuid] - used[target.uuid]
            alike = (source.model, source.total_bytes) == (target.model, target.total_bytes)
            if not alike or difference <= TOLERATED * source.total_bytes:
                continue
            for instance in idle:
                size = held_bytes(instance, source.uuid)
                gain = difference - abs(difference - 2 * size)
                if (
                    size
                    and gain >= WORTH * source.total_bytes
                    and used[target.uuid] + size <= target.total_bytes
                ):
                    found.append((-gain, size, instance.id, instance, source, target))
    if not found:
        return None
    *_, instance, source, target = min(found, key=lambda one: one[:3])
    shares = " and ".join(f"{used[gpu.uuid] / gpu.total_bytes:.0%}" for gpu in (source, target))
    return Rebalance(
        node.id,
        f"{source.uuid} and {target.uuid} of nodes/{node.id} are {shares} full",
        instance.id,
        target.uuid,
    )


def _away(
    node: Node,
    used: Mapping[str, int],
    idle: Sequence[Instance],
    others: Callable[[], Iterable[tuple[Node, int]]],
) -> Rebalance | None:
    total = sum(gpu.total_bytes for gpu in node.gpus)
    if sum(used.values()) < FULL * total:
        return None
    # If no other node can take it, the migration says so, and the node rests before the next try.
    leaving = max(idle, key=lambda i: (i.report.gpu_bytes, i.id), default=None)
    if leaving is None:
        return None
    empty: list[tuple[float, str]] = []
    for other, held in others():
        room = sum(gpu.total_bytes for gpu in other.gpus)
        if room and other.checkpoint_capable and held + leaving.report.gpu_bytes < HALF_EMPTY * room:
            empty.append((held / room, other.id))
    if not empty:
        return None
    share, target = min(empty)
    full = sum(used.values()) / total
    reason = f"the GPUs of nodes/{node.id} are {full:.0%} full, and those of nodes/{target} {share:.0%}"
    return Rebalance(node.id, reason, leaving.id, node=target)


def _used(gpu: Gpu, instances: Sequence[Instance]) -> int:
    return gpu.other_bytes + sum(held_bytes(instance, gpu.uuid) for instance in instances)


def _may_move(instance: Instance, owned: Container[str], now: float) -> bool:
    return (
        instance.state is InstanceState.SERVING
        and not (instance.busy or instance.draining or instance.in_flight)
        and instance.id in owned
        and now - instance.idle_since >= IDLE
    )


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

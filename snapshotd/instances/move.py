"""Bring a live instance to another GPU of its node: parked on the one, resumed on the other."""

from __future__ import annotations

import contextlib

from dumont.aio import to_completion
from dumont.errors import DumontError
from snapshotd.gpu import placement
from snapshotd.instances.lifecycle import Event, advance
from snapshotd.instances.manager import Instances
from snapshotd.jobs import actions
from snapshotd.jobs.context import uses_cuda
from snapshotd.model import Instance, State


async def move(instances: Instances, instance: str, gpu: str) -> Instance:
    """
    Args:
        gpu: UUID or index.

    Raises:
        InvalidArgument, FailedPrecondition, ResourceExhausted: it cannot go there; nothing changed.
        DumontError: its park failed and it serves where it was, or its resume did and it is ended.
    """
    # To its end, like the park and the resume that it is made of.
    return await to_completion(_move(instances, instance, gpu))


async def _move(instances: Instances, instance: str, gpu: str) -> Instance:
    node, known = instances.node, instances.get(instance)
    serving = known.state is State.SERVING
    advance(known.state, Event.PARK if serving else Event.RESUME)
    if serving:
        known = actions.with_gpu_usage(node, known, node.process_tree(known.pid))
    if uses_cuda(known.device):
        placement.named(actions.gpus_of(node).devices, gpu)
    # Before anything is touched. The park gives the promise back, and the resume finds its place anew.
    target = actions.reserve_gpu_to_resume(node, known, gpu)
    if node.gpus is not None:
        node.gpus.reservations.release(instance)
    if serving:
        if target == known.gpu:
            return known
        await instances.park(instance)
    try:
        return await instances.resume(instance, target)
    except DumontError:
        if serving and instances.get(instance).state is State.PARKED:
            # The room was taken meanwhile: back to where it was.
            with contextlib.suppress(DumontError):
                await instances.resume(instance)
        raise

"""Move a living instance to another GPU of its node: suspend it on the one and resume it on the other.

Its requests come along. Where its engine cannot be paused, they are answered first.
"""

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
    """Move an instance, which is serving or parked, to another GPU.

    Args:
        gpu: UUID or index of the GPU.

    Raises:
        InvalidArgument, FailedPrecondition, ResourceExhausted: it cannot go there; nothing has changed.
        DumontError: its park failed and it serves where it was, or its resume failed and it has been ended.
    """
    # Uninterrupted, like the park and the resume that the move consists of.
    return await to_completion(_move(instances, instance, gpu))


async def _move(instances: Instances, instance: str, gpu: str) -> Instance:
    node, known = instances.node, instances.get(instance)
    serving = known.state is State.SERVING
    advance(known.state, Event.PARK if serving else Event.RESUME)
    if serving:
        known = actions.with_gpu_usage(node, known, node.process_tree(known.pid))
    if uses_cuda(known.device):
        placement.named(actions.gpus_of(node).devices, gpu)
    # Checked before anything changes. The park cancels this reservation, and the resume makes its own.
    target = actions.reserve_gpu_to_resume(node, known, gpu)
    if node.gpus is not None:
        node.gpus.reservations.release(instance)
    if serving:
        if target == known.gpu:
            return known
        await _suspend(instances, instance)
    try:
        return await instances.resume(instance, target)
    except DumontError:
        if serving and instances.get(instance).state is State.PARKED:
            # Something else has taken the memory meanwhile, so the instance resumes where it was.
            with contextlib.suppress(DumontError):
                await instances.resume(instance)
        raise


async def _suspend(instances: Instances, instance: str) -> None:
    if uses_cuda(instances.get(instance).device):
        try:
            await instances.suspend(instance)
            return
        except DumontError as error:
            # A model host of an older release, restored from its snapshot, knows no such command.
            if error.reason not in ("NOT_PAUSABLE", "UNKNOWN_COMMAND"):
                raise
    await instances.park(instance)

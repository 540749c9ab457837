"""Recover what an earlier daemon left behind: its model hosts and its directories."""

from __future__ import annotations

import shutil
from dataclasses import replace

import structlog

from dumont.errors import Aborted
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node, uses_cuda
from snapshotd.model import Instance, State
from snapshotd.ports import Host

log = structlog.get_logger(__name__)

# A daemon that ended in one of these states left an instance that was never checked, or no longer wanted.
UNFINISHED = (State.STARTING, State.RESTORING, State.STOPPING)


async def recover(node: Node, instance: Instance, host: Host) -> Instance:
    """Bring a model host that was found to SERVING or PARKED.

    Raises:
        DumontError: it can be neither, and must be ended.
    """
    if instance.state in UNFINISHED:
        raise Aborted("INTERRUPTED", f"the instance was {instance.state.name} when its snapshotd ended")
    if (await host.status())["frozen"]:
        return replace(instance, pid=host.pid, state=State.PARKED)
    # Where nothing can suspend its CUDA, nothing has.
    if uses_cuda(instance.device) and node.gpus is not None and node.gpus.cuda is not None:
        instance = await actions.recover_gpu_state(node, instance, host)
        if instance.state is State.PARKED:
            return replace(instance, pid=host.pid)
    await actions.return_to_service(node, instance.id, host)
    return replace(instance, pid=host.pid, state=State.SERVING, paused=False)


def sweep(node: Node, known: frozenset[str]) -> None:
    """Remove the directories of instances that are not ``known``."""
    for path in node.instance_directory("").iterdir():
        if path.name not in known:
            log.warning("orphaned_directory_removed", instance=path.name)
            shutil.rmtree(path, ignore_errors=True)

"""What an earlier daemon left: model hosts brought to a state that the table knows, directories of none."""

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

# What a daemon that ended in them left behind was never checked, or not wanted any more.
UNFINISHED = (State.STARTING, State.RESTORING, State.STOPPING)


async def recover(node: Node, instance: Instance, host: Host) -> Instance:
    """Bring a found model host to a state that the table knows, or raise."""
    if instance.state in UNFINISHED:
        raise Aborted("INTERRUPTED", f"it was {instance.state.name} when its snapshotd ended")
    if (await host.status())["frozen"]:
        return replace(instance, pid=host.pid, state=State.PARKED)
    if uses_cuda(instance.device):
        instance = await actions.recover_gpu_state(node, instance, host)
        if instance.state is State.PARKED:
            return replace(instance, pid=host.pid)
    await actions.return_to_service(node, instance.id, host)
    return replace(instance, pid=host.pid, state=State.SERVING)


def sweep(node: Node, known: frozenset[str]) -> None:
    """Remove the directories of instances that an earlier daemon had given up."""
    for path in node.instance_directory("").iterdir():
        if path.name not in known:
            log.warning("directory of no instance removed", instance=path.name)
            shutil.rmtree(path, ignore_errors=True)

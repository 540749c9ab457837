"""Park and resume: give up the GPU or, without one, the CPU, and take it again; the process stays.

On a GPU the weights leave the process first, as for a capture: they are in their files anyway, and copying
them out of the GPU and back through the driver's checkpoint takes ten times longer than attaching them.
"""

from __future__ import annotations

from dataclasses import replace

from snapshotd.gpu import placement
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node, Subject, uses_cuda
from snapshotd.jobs.executor import Step


def park(node: Node, subject: Subject) -> list[Step]:
    """Answer what is running, then give up the GPU or, without one, the CPU."""

    async def drain() -> None:
        await actions.drain(node, subject)

    async def keep_serving() -> None:
        await actions.keep_serving(node, subject)

    async def freeze() -> None:
        await actions.host_of(subject).freeze()

    async def thaw() -> None:
        await actions.unless_lost(subject, actions.host_of(subject).thaw)

    async def quiesce() -> None:
        actions.note_gpu_memory(node, subject)
        actions.keep_room(node, subject)
        await actions.quiesce(node, subject)

    async def suspend() -> None:
        await actions.suspend_cuda(node, subject)

    async def trim() -> None:
        await actions.trim(node, subject)

    async def rouse() -> None:
        await actions.unless_lost(subject, lambda: actions.rouse_cuda(node, subject))

    if uses_cuda(subject.instance.device):
        return [
            Step("drain", drain, keep_serving),
            Step("quiesce", quiesce),
            Step("cuda_checkpoint", suspend, rouse),
            Step("trim", trim),
        ]
    return [Step("drain", drain, keep_serving), Step("freeze", freeze, thaw)]


def resume(node: Node, subject: Subject, gpu: str = "") -> list[Step]:
    """Let a parked instance run and answer again.

    Args:
        gpu: UUID of the GPU to come back on; empty: where it was.
    """

    async def thaw() -> None:
        await actions.host_of(subject).thaw()

    async def revive() -> None:
        here = [known.uuid for known in node.gpus]
        home, target = subject.instance.gpu, gpu or subject.instance.gpu
        # First: its weights are brought to where it comes back.
        subject.instance = replace(subject.instance, gpu=target)
        devices = placement.device_map(here, here, home, target) if target else {}
        await actions.revive_cuda(node, subject, devices)

    async def wake() -> None:
        await actions.wake(node, subject)

    async def serve() -> None:
        await actions.serve(node, subject)

    async def accept() -> None:
        await actions.accept(node, subject)

    if uses_cuda(subject.instance.device):
        return [Step("cuda_restore", revive), Step("wake", wake), Step("serve", serve)]
    return [Step("thaw", thaw), Step("accept", accept)]

"""Park and resume: give up the GPU or, without one, the CPU, and take it again. The process stays.

On a GPU the weights are detached first, as for a capture. They are in their files anyway, and copying them
out of the GPU and back by the driver's checkpoint takes ten times longer than attaching them again.

A park answers the running requests first. An instance that only moves to another GPU is suspended with them:
its model host is paused between two steps, and its requests go on when it has resumed.
"""

from __future__ import annotations

from dataclasses import replace

from snapshotd.gpu import placement
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node, Subject, uses_cuda
from snapshotd.jobs.executor import Step


def park(node: Node, subject: Subject) -> list[Step]:
    """The steps of a park: answer the running requests, then give up the GPU or, without one, the CPU."""

    async def drain() -> None:
        await actions.drain(node, subject)

    async def ensure_serving() -> None:
        await actions.ensure_serving(node, subject)

    async def freeze() -> None:
        await actions.host_of(subject).freeze()

    async def thaw() -> None:
        await actions.run_or_end(subject, actions.host_of(subject).thaw)

    async def quiesce() -> None:
        actions.record_gpu_memory(node, subject)
        actions.reserve_gpu_memory(node, subject)
        await actions.quiesce(node, subject)

    async def suspend() -> None:
        await actions.suspend_cuda(node, subject)

    async def trim() -> None:
        await actions.trim(node, subject)

    async def recover_cuda() -> None:
        await actions.run_or_end(subject, lambda: actions.recover_cuda(node, subject))

    if uses_cuda(subject.instance.device):
        return [
            Step("drain", drain, ensure_serving),
            Step("quiesce", quiesce),
            Step("cuda_checkpoint", suspend, recover_cuda),
            Step("trim", trim),
        ]
    return [Step("drain", drain, ensure_serving), Step("freeze", freeze, thaw)]


def suspend(node: Node, subject: Subject) -> list[Step]:
    """The steps that make an instance give up its GPU with its requests, which go on when it resumes."""

    async def pause() -> None:
        actions.record_gpu_memory(node, subject)
        actions.reserve_gpu_memory(node, subject)
        await actions.pause(node, subject)

    async def ensure_serving() -> None:
        await actions.ensure_serving(node, subject)

    async def checkpoint() -> None:
        await actions.suspend_cuda(node, subject)

    async def recover_cuda() -> None:
        await actions.run_or_end(subject, lambda: actions.recover_cuda(node, subject))

    return [Step("pause", pause, ensure_serving), Step("cuda_checkpoint", checkpoint, recover_cuda)]


def resume(node: Node, subject: Subject, gpu: str = "") -> list[Step]:
    """The steps of a resume.

    Args:
        gpu: UUID of the GPU to resume on; empty for the one that the instance was on.
    """

    async def thaw() -> None:
        await actions.host_of(subject).thaw()

    async def resume_cuda() -> None:
        here = node.gpu_uuids()
        home, target = subject.instance.gpu, gpu or subject.instance.gpu
        # Set first, because the loader copies the weights to this GPU.
        subject.instance = replace(subject.instance, gpu=target)
        devices = placement.device_map(here, here, home, target) if target else {}
        await actions.resume_cuda(node, subject, devices)

    async def wake() -> None:
        await actions.wake(node, subject)

    async def serve() -> None:
        await actions.serve(node, subject)

    async def accept() -> None:
        await actions.accept(node, subject)

    async def go_on() -> None:
        await actions.go_on(node, subject)

    if subject.instance.paused:
        return [Step("cuda_restore", resume_cuda), Step("continue", go_on)]
    if uses_cuda(subject.instance.device):
        return [Step("cuda_restore", resume_cuda), Step("wake", wake), Step("serve", serve)]
    return [Step("thaw", thaw), Step("accept", accept)]

"""The single moves that jobs are made of, on the instance that a job works on."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace

import structlog

from dumont.errors import Aborted, DumontError, FailedPrecondition, Internal, ResourceExhausted
from snapshotd.cuda import tree
from snapshotd.executor import Action, Step
from snapshotd.model import Canary, Instance, Json, State
from snapshotd.node import Node, Subject, uses_cuda
from snapshotd.ports import Cuda, Host
from snapshotd.shim.mounts import WEIGHTS_MOUNT

log = structlog.get_logger(__name__)

SOCKET = "/run/dumont/host.sock"
LOADER_SOCKET = f"{WEIGHTS_MOUNT}/loader.sock"


def host_of(subject: Subject) -> Host:
    if subject.host is None:
        raise Internal("NO_HOST", f"instances/{subject.instance.id} has no process")
    return subject.host


async def serve_host(node: Node, instance: str, host: Host) -> None:
    """Open its socket."""
    await host.call("serve", node.deadlines.serve, socket=SOCKET, instance=instance)


async def wake_host(node: Node, instance: str, host: Host) -> None:
    """End its quiescence; it has a new identity then and draws other random numbers than its twins."""
    await host.call("wake", node.deadlines.wake, instance=instance, entropy=secrets.token_hex(32))


def cuda_of(node: Node) -> Cuda:
    if node.cuda is None:
        raise FailedPrecondition("NO_GPU", "this node has no CUDA driver, and the process needs one")
    return node.cuda


async def drain(node: Node, subject: Subject) -> None:
    """Refuse new requests and answer the running ones."""
    seconds = node.deadlines.drain
    await host_of(subject).call("drain", seconds + node.deadlines.serve, deadline_seconds=seconds)


async def quiesce(node: Node, subject: Subject) -> None:
    """Close everything that a snapshot could not hold; weights leave the GPU."""
    await host_of(subject).call("quiesce", node.deadlines.quiesce)


async def suspend_cuda(node: Node, subject: Subject) -> None:
    await tree.suspend(cuda_of(node), [host_of(subject).pid], node.deadlines.cuda_lock)


async def trim(node: Node, subject: Subject) -> None:
    """Let go of the zeros among what came from the GPU: most of it was never written to."""
    await host_of(subject).call("trim", node.deadlines.quiesce)


async def revive_cuda(node: Node, subject: Subject, devices: Mapping[str, str]) -> None:
    """Bring the process back to its GPUs, its weights on their way meanwhile.

    Args:
        devices: GPU UUIDs, old to new, every GPU of the node; empty: the same GPUs.
    """
    await order_weights(node, subject)
    await tree.revive(cuda_of(node), [host_of(subject).pid], devices)


async def order_weights(node: Node, subject: Subject) -> None:
    """Let the loader begin; the model host takes over what it brought when it wakes."""
    if loader := await loader_of(node, subject, subject.instance.device):
        await host_of(subject).call("order_weights", node.deadlines.serve, **loader)


async def loader_of(node: Node, subject: Subject, device: str) -> dict[str, str]:
    """What a model host must know to have its weights brought; empty when nobody can bring them.

    Args:
        device: as configured or as the model host named it.
    """
    if node.loader is None or not subject.instance.weight_files or not await node.loader.ready():
        return {}
    return {"loader": LOADER_SOCKET, "gpu": gpu_of(node, device)}


def gpu_of(node: Node, device: str) -> str:
    """UUID of the GPU that a model host on ``device`` computes on; ``auto`` is the first."""
    return node.gpus[int(device.partition(":")[2] or 0)].uuid


def note_gpu_memory(node: Node, subject: Subject) -> None:
    """Remember what the process holds on the GPU, while it does: to come back it needs as much."""
    if node.gpu_memory is not None:
        used = node.gpu_memory.used_by(host_of(subject).pid)
        subject.instance = replace(subject.instance, gpu_bytes=used)


def check_gpu_memory(node: Node, device: str, needed: int) -> None:
    """Refuse before the driver begins: a CUDA restore that runs out of memory strands its process.

    Raises:
        ResourceExhausted: the GPU has less free than ``needed`` bytes.
    """
    if node.gpu_memory is None or not uses_cuda(device):
        return
    free = node.gpu_memory.free(int(device.partition(":")[2] or 0))
    if free < needed:
        raise ResourceExhausted(
            "GPU_MEMORY",
            f"{device} has {free >> 20} MiB free and the process needs {needed >> 20}; park or stop another",
            metadata={"device": device, "free_bytes": str(free), "needed_bytes": str(needed)},
        )


async def rouse_cuda(node: Node, subject: Subject) -> None:
    """Bring a source back to running, from whatever state its suspension reached."""
    await order_weights(node, subject)
    await tree.rouse(cuda_of(node), [host_of(subject).pid])


async def settle_cuda(node: Node, instance: Instance, host: Host) -> bool:
    """After a crash of the daemon: True when the process is parked; else its CUDA runs again."""
    cuda = cuda_of(node)
    if instance.state is State.PARKED and await cuda.state(host.pid) == "checkpointed":
        return True
    await tree.rouse(cuda, [host.pid])
    return False


async def serve(node: Node, subject: Subject) -> None:
    await serve_host(node, subject.instance.id, host_of(subject))


async def wake(node: Node, subject: Subject) -> None:
    await wake_host(node, subject.instance.id, host_of(subject))


async def accept(node: Node, subject: Subject) -> None:
    await host_of(subject).call("accept", node.deadlines.serve)


async def bring_back(node: Node, instance: str, host: Host) -> None:
    """Make a model host serve again, in whatever state a job or a crash left it.

    Raises:
        Aborted: it was on its way in or out, and cannot serve.
    """
    # It answers only when it has ended what it is doing, and that may be a drain.
    state = (await host.call("status", node.deadlines.drain + node.deadlines.serve))["state"]
    if state == "DRAINED":
        await host.call("accept", node.deadlines.serve)
    elif state in ("QUIESCED", "AWAKE"):
        if state == "QUIESCED":
            await wake_host(node, instance, host)
        await serve_host(node, instance, host)
    elif state != "SERVING":
        raise Aborted("INTERRUPTED", f"the model host of instances/{instance} was {state}")


async def keep_serving(node: Node, subject: Subject) -> None:
    """The undo of whatever stopped an instance from serving: it serves again, or it is ended."""
    await unless_lost(subject, lambda: bring_back(node, subject.instance.id, host_of(subject)))


async def unless_lost(subject: Subject, action: Action) -> None:
    """Bring a source back to serving or, where that fails, end it: it must not stay in between."""
    try:
        await action()
    except DumontError as error:
        log.error("instance could not be brought back", instance=subject.instance.id, reason=error.reason)
        await release(subject)


async def release(subject: Subject) -> None:
    if subject.host is not None:
        # Known until it is gone: what fails here is tried again by the next who ends it.
        await subject.host.release()
        subject.host = None


def directory_step(node: Node, instance: Instance) -> Step:
    """Make the instance's directory; undone, it is gone with everything in it."""

    async def make() -> None:
        node.instance_directory(instance.id).mkdir(mode=0o700)

    return Step("directory", make, lambda: remove_directory(node, instance))


async def remove_directory(node: Node, instance: Instance) -> None:
    await asyncio.to_thread(shutil.rmtree, node.instance_directory(instance.id), ignore_errors=True)


def canary_of(answer: Json) -> Canary:
    return Canary(tuple(answer["tokens"]), float(answer["logprob"]))

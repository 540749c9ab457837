"""The actions that steps of several jobs share."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from dumont.aio import to_completion
from dumont.errors import Aborted, DumontError, FailedPrecondition, Internal
from snapshotd.cuda import suspension
from snapshotd.gpu import placement
from snapshotd.jobs.context import Gpus, Node, Subject, uses_cuda
from snapshotd.jobs.executor import Action, Step
from snapshotd.model import Canary, Capacity, Gpu, Instance, Json, Load, Model, State
from snapshotd.ports import Cuda, Host
from snapshotd.system.mounts import WEIGHTS_MOUNT

log = structlog.get_logger(__name__)

UNSUSPENDABLE = (
    "instances on this node's GPUs can start and serve, but not be captured, restored, parked or resumed"
)

SOCKET = "/run/dumont/host.sock"
LOADER_SOCKET = f"{WEIGHTS_MOUNT}/loader.sock"


def host_of(subject: Subject) -> Host:
    """The host of an instance.

    Raises:
        Internal: NO_HOST, it has none.
    """
    if subject.host is None:
        raise Internal("NO_HOST", f"instances/{subject.instance.id} has no process")
    return subject.host


async def serve_host(node: Node, instance: str, host: Host) -> None:
    """Have a model host open its socket."""
    await host.call("serve", node.deadlines.serve, socket=SOCKET, instance=instance)


async def wake_host(node: Node, instance: str, host: Host) -> None:
    """End the quiescence of a model host.

    It takes a new identity and reseeds its random generators, so that it differs from other copies of its
    snapshot.
    """
    await host.call("wake", node.deadlines.wake, instance=instance, entropy=secrets.token_hex(32))


def gpus_of(node: Node) -> Gpus:
    """The node's GPUs.

    Raises:
        FailedPrecondition: NO_GPU, it uses none.
    """
    if node.gpus is None:
        raise FailedPrecondition("NO_GPU", "the process needs a GPU, and this node has or uses none")
    return node.gpus


async def drain(node: Node, subject: Subject) -> None:
    """Have the model host refuse new requests and answer the running ones."""
    seconds = node.deadlines.drain
    await host_of(subject).call("drain", seconds + node.deadlines.serve, deadline_seconds=seconds)


async def quiesce(node: Node, subject: Subject) -> None:
    """Have the model host close everything that an image cannot contain, and detach its weights."""
    await host_of(subject).call("quiesce", node.deadlines.quiesce)


async def digests(node: Node, model: Model, options: Mapping[str, Any]) -> Mapping[str, str]:
    """The digest of each file that a process reads into its memory, by name.

    Those are the files of its model besides the weights, and everything of the adapters that its engine's
    options name.

    Raises:
        FailedPrecondition: MODEL_INVALID, a file cannot be read.
    """
    found = dict(await node.models.digests(model))
    for name, directory in options.get("lora_modules", {}).items():
        adapter = await node.models.adapter(directory)
        files = await node.models.digests(adapter)
        found |= {f"lora_modules/{name}/{file}": digest for file, digest in files.items()}
        found[f"lora_modules/{name}"] = await node.weights.digest(adapter)
    return found


async def cuda_pids(node: Node, host: Host) -> list[int]:
    """The pids of a model host's CUDA processes, parents before children."""
    return await suspension.find(cuda_of(node), node.process_tree(host.pid))


async def suspend_cuda(node: Node, subject: Subject) -> None:
    """Copy the GPU memory of an instance to host memory, and free the GPU."""
    pids = await cuda_pids(node, host_of(subject))
    await suspension.suspend(cuda_of(node), pids, node.deadlines.cuda_lock)


async def trim(node: Node, subject: Subject) -> None:
    """Drop the zeros among the memory that came from the GPU, most of which was never written to."""
    # Uninterrupted, because its undo lets the driver use that memory again.
    await to_completion(host_of(subject).call("trim", node.deadlines.quiesce))


async def resume_cuda(node: Node, subject: Subject, devices: Mapping[str, str]) -> None:
    """Copy the GPU memory of an instance back, while the loader copies its weights.

    Args:
        devices: old GPU UUIDs to new ones, for every GPU of the node; empty for the same GPUs.
    """
    await order_weights(node, subject)
    await suspension.resume(cuda_of(node), await cuda_pids(node, host_of(subject)), devices)


async def recover_cuda(node: Node, subject: Subject) -> None:
    """Make the CUDA processes of an instance run again, whatever state its suspension left them in."""
    await order_weights(node, subject)
    host = host_of(subject)
    await _recover_cuda(node, host, await cuda_pids(node, host))


async def _recover_cuda(node: Node, host: Host, pids: Sequence[int]) -> None:
    # The model host answers only when it has finished earlier commands: a trim must not race with the driver.
    await host.call("status", node.deadlines.quiesce)
    await suspension.recover(cuda_of(node), pids)


async def order_weights(node: Node, subject: Subject) -> None:
    """Have the loader copy the weights to the GPU. The model host takes them over when it wakes.

    Otherwise the model host copies its weights itself, so a failure here is only logged.
    """
    try:
        if loader := await loader_of(node, subject):
            await host_of(subject).call("order_weights", node.deadlines.serve, **loader)
    except DumontError as error:
        log.warning("weights_not_ordered", instance=subject.instance.id, reason=error.reason)


async def loader_of(node: Node, subject: Subject) -> dict[str, str]:
    """Arguments that tell a model host how to reach the loader; empty if the loader cannot be used."""
    instance = subject.instance
    loader = node.gpus.loader if node.gpus else None
    if loader is None or not instance.gpu or not instance.weight_files or not await loader.ready():
        return {}
    return {"loader": LOADER_SOCKET, "gpu": instance.gpu}


async def recover_gpu_state(node: Node, instance: Instance, host: Host) -> Instance:
    """Recover the CUDA processes of an instance after a crash of the daemon.

    Returns:
        The instance, still PARKED, or SERVING with its CUDA processes running and its GPU looked up.

    Raises:
        DumontError: it can be neither.
    """
    cuda, pids = cuda_of(node), await cuda_pids(node, host)
    if instance.state is State.PARKED and {await cuda.state(pid) for pid in pids} == {"checkpointed"}:
        return instance
    await _recover_cuda(node, host, pids)
    return replace(with_gpu_usage(node, instance, pids), state=State.SERVING)


def record_gpu_memory(node: Node, subject: Subject) -> None:
    """Record which GPU the process is on and how much memory it holds there, which it needs to resume."""
    if node.gpus is not None:
        subject.instance = with_gpu_usage(node, subject.instance, node.process_tree(host_of(subject).pid))


def reserve_gpu_memory(node: Node, subject: Subject) -> None:
    """Reserve, until the job ends, the GPU memory that a source gives up and needs again."""
    instance = subject.instance
    if node.gpus is not None and instance.gpu and instance.gpu_bytes:
        node.gpus.reservations.reserve(instance.id, instance.gpu, instance.gpu_bytes)


def with_gpu_usage(node: Node, instance: Instance, pids: Sequence[int]) -> Instance:
    """The instance with its GPU and GPU memory as NVML shows them. In some containers it shows nothing."""
    used = node.gpus.status.used_by(pids) if node.gpus else {}
    if not any(used.values()):
        return instance
    gpu = max(used, key=lambda uuid: used[uuid])
    return replace(instance, gpu=gpu, gpu_bytes=used[gpu])


def cuda_of(node: Node) -> Cuda:
    """What suspends CUDA processes on this node.

    Raises:
        FailedPrecondition: NO_GPU, or GPU_NOT_SUSPENDABLE: nothing here can.
    """
    gpus = gpus_of(node)
    if gpus.cuda is None:
        raise _unsuspendable(gpus.unsuspendable)
    return gpus.cuda


def check_suspendable(node: Node, device: str) -> None:
    """Refuse to suspend a CUDA process where that cannot be done, before anything has changed.

    Raises:
        FailedPrecondition: GPU_NOT_SUSPENDABLE, GPU_MIG or GPU_MPS; the GPU is named.
    """
    if not uses_cuda(device):
        return
    if node.gpus is None:
        raise _unsuspendable("this node's GPUs are not known to it; see the findings of 'dumont doctor'")
    cuda_of(node)
    for sharing in node.gpus.status.sharing():
        raise FailedPrecondition(
            f"GPU_{sharing.kind}",
            f"{UNSUSPENDABLE}: {sharing.message}",
            metadata={"gpu": sharing.gpu} if sharing.gpu else {},
        )


def _unsuspendable(why: str) -> FailedPrecondition:
    return FailedPrecondition("GPU_NOT_SUSPENDABLE", f"{UNSUSPENDABLE}: {why}")


def reserve_gpu(node: Node, instance: Instance, home: Gpu | None, wanted: str, needed: int) -> str:
    """Choose a GPU for an instance, and reserve memory there until its job ends.

    Args:
        home: the GPU that the state of the process comes from; None for a new process.
        wanted: UUID or index; empty for the GPU with the most free memory.
        needed: bytes to reserve.

    Returns:
        The GPU's UUID.

    Raises:
        InvalidArgument, FailedPrecondition: the instance cannot go to the wanted GPU.
        ResourceExhausted: GPU_MEMORY, the GPU has too little free memory.
    """
    gpus = gpus_of(node)
    free = {gpu.uuid: gpus.free(gpu.uuid) for gpu in gpus.devices}
    gpu = placement.choose(gpus.devices, free, home, wanted)
    placement.check_free_memory(gpu, free[gpu.uuid], needed)
    gpus.reservations.reserve(instance.id, gpu.uuid, needed)
    return gpu.uuid


def reserve_gpu_to_resume(node: Node, instance: Instance, wanted: str) -> str:
    """Choose the GPU on which a parked instance resumes, and reserve memory there until its job ends.

    Args:
        wanted: UUID or index of a GPU; empty for the one it was on or, if that has too little free memory,
            the one with the most.

    Returns:
        The GPU's UUID; empty for an instance without CUDA, or if it is unknown which GPU it was on.

    Raises:
        InvalidArgument, FailedPrecondition: the instance cannot go to the wanted GPU.
        ResourceExhausted: GPU_MEMORY, the GPU has too little free memory.
    """
    if not uses_cuda(instance.device):
        if wanted:
            raise FailedPrecondition(
                "NO_GPU", f"instances/{instance.id} runs on the CPU and cannot go to a GPU; start it on one"
            )
        return ""
    if not instance.gpu:
        if wanted:
            raise FailedPrecondition(
                "GPU_NOT_KNOWN",
                f"it is not known which GPU instances/{instance.id} was on, so it cannot go to another one",
            )
        return ""
    gpus = gpus_of(node)
    home = placement.named(gpus.devices, instance.gpu)
    if not wanted and gpus.free(home.uuid) >= instance.gpu_bytes:
        wanted = home.uuid
    return reserve_gpu(node, instance, home, wanted, instance.gpu_bytes)


async def serve(node: Node, subject: Subject) -> None:
    """Have the instance's model host open its socket."""
    await serve_host(node, subject.instance.id, host_of(subject))


async def wake(node: Node, subject: Subject) -> None:
    """End the quiescence of the instance's model host."""
    await wake_host(node, subject.instance.id, host_of(subject))


async def accept(node: Node, subject: Subject) -> None:
    """Have a drained model host accept requests again."""
    await host_of(subject).call("accept", node.deadlines.serve)


async def pause(node: Node, subject: Subject) -> None:
    """Have the model host stop between two steps; its requests wait until it continues."""
    await host_of(subject).call("pause", node.deadlines.quiesce)
    subject.instance = replace(subject.instance, paused=True)


async def go_on(node: Node, subject: Subject) -> None:
    """Have a paused model host go on with its requests."""
    await host_of(subject).call("continue", node.deadlines.wake)
    subject.instance = replace(subject.instance, paused=False)


async def return_to_service(node: Node, instance: str, host: Host) -> None:
    """Make a model host serve again, whatever state a job or a crash has left it in.

    Raises:
        Aborted: INTERRUPTED, it was loading or ending and cannot serve.
    """
    # The model host answers only when it has finished earlier commands, which may include a drain.
    state = (await host.call("status", node.deadlines.drain + node.deadlines.serve))["state"]
    if state == "DRAINED":
        await host.call("accept", node.deadlines.serve)
    elif state == "PAUSED":
        await host.call("continue", node.deadlines.wake)
    elif state in ("QUIESCED", "AWAKE"):
        if state == "QUIESCED":
            await wake_host(node, instance, host)
        await serve_host(node, instance, host)
    elif state != "SERVING":
        raise Aborted("INTERRUPTED", f"the model host of instances/{instance} was {state}")


async def ensure_serving(node: Node, subject: Subject) -> None:
    """Undo whatever stopped an instance from serving: it serves again, or is ended."""
    await run_or_end(subject, lambda: return_to_service(node, subject.instance.id, host_of(subject)))
    subject.instance = replace(subject.instance, paused=False)


async def run_or_end(subject: Subject, action: Action) -> None:
    """Run an action that makes a source serve again. If it fails, end the source."""
    try:
        await action()
    except DumontError as error:
        log.error("instance_not_recovered", instance=subject.instance.id, reason=error.reason)
        await release(subject)


async def release(subject: Subject) -> None:
    """End the process of an instance, if it has one."""
    if subject.host is not None:
        # Forgotten only once it has ended: if this fails, the next attempt to end the instance tries again.
        await subject.host.release()
        subject.host = None


def directory_step(node: Node, instance: Instance) -> Step:
    """The step that makes the instance's directory. Its undo removes the directory and everything in it."""

    async def make() -> None:
        node.instance_directory(instance.id).mkdir(mode=0o700)

    return Step("directory", make, lambda: remove_directory(node, instance))


async def remove_directory(node: Node, instance: Instance) -> None:
    """Remove the instance's directory and everything in it."""
    await asyncio.to_thread(shutil.rmtree, node.instance_directory(instance.id), ignore_errors=True)


def canary_of(answer: Json) -> Canary:
    """The canary in a model host's answer."""
    return Canary(tuple(answer["tokens"]), float(answer["logprob"]))


def with_load(instance: Instance, answer: Json) -> Instance:
    """The instance with what its model host answered to ``load`` or ``status``.

    A host may be older than this daemon, or come from an older snapshot: what it does not tell stays unknown.
    """
    told = answer.get("capacity")
    capacity = instance.capacity
    if isinstance(told, Mapping) and _count(told.get("sequences")):
        reason = told.get("unbatched_reason")
        capacity = Capacity(
            _count(told["sequences"]),
            _count(told.get("kv_tokens")) or None,
            reason if isinstance(reason, str) else "",
        )
    load = Load(
        _count(answer.get("running")), _count(answer.get("waiting")), _count(answer.get("kv_tokens_used"))
    )
    return replace(instance, capacity=capacity, load=load)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

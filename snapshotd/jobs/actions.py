"""The single moves that jobs are made of, on the instance that a job works on."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from dumont.aio import to_completion
from dumont.errors import Aborted, DumontError, FailedPrecondition, Internal
from snapshotd.cuda import suspension
from snapshotd.gpu import placement
from snapshotd.jobs.context import Gpus, Node, Subject, uses_cuda
from snapshotd.jobs.executor import Action, Step
from snapshotd.model import Canary, Capacity, Gpu, Instance, Json, Load, State
from snapshotd.ports import Host
from snapshotd.system.mounts import WEIGHTS_MOUNT

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


def gpus_of(node: Node) -> Gpus:
    """The node's GPUs.

    Raises:
        FailedPrecondition: NO_GPU, it uses none.
    """
    if node.gpus is None:
        raise FailedPrecondition("NO_GPU", "the process needs a GPU, and this node has or uses none")
    return node.gpus


async def drain(node: Node, subject: Subject) -> None:
    """Refuse new requests and answer the running ones."""
    seconds = node.deadlines.drain
    await host_of(subject).call("drain", seconds + node.deadlines.serve, deadline_seconds=seconds)


async def quiesce(node: Node, subject: Subject) -> None:
    """Close everything that a snapshot could not hold; weights leave the GPU."""
    await host_of(subject).call("quiesce", node.deadlines.quiesce)


async def cuda_pids(node: Node, host: Host) -> list[int]:
    """The CUDA processes of a model host's tree, parents before children."""
    return await suspension.find(gpus_of(node).cuda, node.process_tree(host.pid))


async def suspend_cuda(node: Node, subject: Subject) -> None:
    """Move what the process holds on GPUs to host memory."""
    pids = await cuda_pids(node, host_of(subject))
    await suspension.suspend(gpus_of(node).cuda, pids, node.deadlines.cuda_lock)


async def trim(node: Node, subject: Subject) -> None:
    """Let go of the zeros among what came from the GPU: most of it was never written to."""
    # Whole, also when cancelled: what undoes this lets the driver use that memory again.
    await to_completion(host_of(subject).call("trim", node.deadlines.quiesce))


async def resume_cuda(node: Node, subject: Subject, devices: Mapping[str, str]) -> None:
    """Bring the process back to its GPUs, its weights on their way meanwhile.

    Args:
        devices: GPU UUIDs, old to new, every GPU of the node; empty: the same GPUs.
    """
    await order_weights(node, subject)
    await suspension.resume(gpus_of(node).cuda, await cuda_pids(node, host_of(subject)), devices)


async def recover_cuda(node: Node, subject: Subject) -> None:
    """Bring a source back to running, from whatever state its suspension reached."""
    await order_weights(node, subject)
    host = host_of(subject)
    await _recover_cuda(node, host, await cuda_pids(node, host))


async def _recover_cuda(node: Node, host: Host, pids: Sequence[int]) -> None:
    # It answers only when it has ended what it was told before; a trim must not meet the driver.
    await host.call("status", node.deadlines.quiesce)
    await suspension.recover(gpus_of(node).cuda, pids)


async def order_weights(node: Node, subject: Subject) -> None:
    """Let the loader begin; the model host takes over what it brought when it wakes.

    Without it the model host copies its weights itself, so nothing fails here.
    """
    try:
        if loader := await loader_of(node, subject):
            await host_of(subject).call("order_weights", node.deadlines.serve, **loader)
    except DumontError as error:
        log.warning("weights could not be ordered", instance=subject.instance.id, reason=error.reason)


async def loader_of(node: Node, subject: Subject) -> dict[str, str]:
    """What a model host must know to have its weights brought; empty when nobody can bring them."""
    instance = subject.instance
    loader = node.gpus.loader if node.gpus else None
    if loader is None or not instance.gpu or not instance.weight_files or not await loader.ready():
        return {}
    return {"loader": LOADER_SOCKET, "gpu": instance.gpu}


async def recover_gpu_state(node: Node, instance: Instance, host: Host) -> Instance:
    """After a crash of the daemon: the instance parked, or with its CUDA running again and where it is.

    Raises:
        DumontError: it can be neither.
    """
    cuda, pids = gpus_of(node).cuda, await cuda_pids(node, host)
    if instance.state is State.PARKED and {await cuda.state(pid) for pid in pids} == {"checkpointed"}:
        return instance
    await _recover_cuda(node, host, pids)
    return replace(with_gpu_usage(node, instance, pids), state=State.SERVING)


def record_gpu_memory(node: Node, subject: Subject) -> None:
    """Remember where the process is and what it holds there: to come back it needs as much."""
    if node.gpus is not None:
        subject.instance = with_gpu_usage(node, subject.instance, node.process_tree(host_of(subject).pid))


def reserve_gpu_memory(node: Node, subject: Subject) -> None:
    """Promise a source the GPU memory that it gives up for a while, until its job has ended."""
    instance = subject.instance
    if node.gpus is not None and instance.gpu and instance.gpu_bytes:
        node.gpus.reservations.reserve(instance.id, instance.gpu, instance.gpu_bytes)


def with_gpu_usage(node: Node, instance: Instance, pids: Sequence[int]) -> Instance:
    """As NVML sees it; unchanged where NVML does not see it, as in some containers."""
    used = node.gpus.status.used_by(pids) if node.gpus else {}
    if not any(used.values()):
        return instance
    gpu = max(used, key=lambda uuid: used[uuid])
    return replace(instance, gpu=gpu, gpu_bytes=used[gpu])


def check_not_shared(node: Node, device: str) -> None:
    """Refuse before anything is touched what the driver cannot do beside MIG and MPS.

    Raises:
        FailedPrecondition: GPU_MIG or GPU_MPS; the GPU is named.
    """
    if node.gpus is None or not uses_cuda(device):
        return
    for sharing in node.gpus.status.sharing():
        raise FailedPrecondition(
            f"GPU_{sharing.kind}",
            f"instances on this node's GPUs can start and serve, but not be captured, restored, parked or "
            f"resumed: {sharing.message}",
            metadata={"gpu": sharing.gpu} if sharing.gpu else {},
        )


def reserve_gpu(node: Node, instance: Instance, home: Gpu | None, wanted: str, needed: int) -> str:
    """Choose a GPU, and promise the memory there to the instance until its job ends.

    Args:
        home: where its state comes from.
        wanted: UUID or index; empty: where there is most room.
        needed: bytes; a GPU with less free is refused.

    Raises:
        InvalidArgument, FailedPrecondition: the wanted GPU is none that it can go to.
        ResourceExhausted: it has too little room.
    """
    gpus = gpus_of(node)
    free = {gpu.uuid: gpus.free(gpu.uuid) for gpu in gpus.devices}
    gpu = placement.choose(gpus.devices, free, home, wanted)
    placement.check_free_memory(gpu, free[gpu.uuid], needed)
    gpus.reservations.reserve(instance.id, gpu.uuid, needed)
    return gpu.uuid


def reserve_gpu_to_resume(node: Node, instance: Instance, wanted: str) -> str:
    """Where a parked process comes back, with the memory there promised to it until its job ends.

    Args:
        wanted: UUID or index of a GPU; empty: where it was or, if there is no room, where there is most.

    Returns:
        The GPU's UUID; empty without one, or where nobody knows which it was.

    Raises:
        InvalidArgument, FailedPrecondition: the wanted GPU is none that it can go to.
        ResourceExhausted: it has too little room.
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
                f"which GPU instances/{instance.id} is on is not known here, so it cannot be moved from it",
            )
        return ""
    gpus = gpus_of(node)
    home = placement.named(gpus.devices, instance.gpu)
    if not wanted and gpus.free(home.uuid) >= instance.gpu_bytes:
        wanted = home.uuid
    return reserve_gpu(node, instance, home, wanted, instance.gpu_bytes)


async def serve(node: Node, subject: Subject) -> None:
    await serve_host(node, subject.instance.id, host_of(subject))


async def wake(node: Node, subject: Subject) -> None:
    await wake_host(node, subject.instance.id, host_of(subject))


async def accept(node: Node, subject: Subject) -> None:
    await host_of(subject).call("accept", node.deadlines.serve)


async def return_to_service(node: Node, instance: str, host: Host) -> None:
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


async def ensure_serving(node: Node, subject: Subject) -> None:
    """The undo of whatever stopped an instance from serving: it serves again, or it is ended."""
    await or_release(subject, lambda: return_to_service(node, subject.instance.id, host_of(subject)))


async def or_release(subject: Subject, action: Action) -> None:
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


def with_load(instance: Instance, answer: Json) -> Instance:
    """The instance with what its model host answered to ``load`` or ``status``.

    A host may be older than this daemon, or come from an older snapshot: what it does not tell stays unknown.
    """
    told = answer.get("capacity")
    capacity = instance.capacity
    if isinstance(told, Mapping) and _count(told.get("sequences")):
        capacity = Capacity(_count(told["sequences"]), _count(told.get("kv_tokens")) or None)
    load = Load(
        _count(answer.get("running")), _count(answer.get("waiting")), _count(answer.get("kv_tokens_used"))
    )
    return replace(instance, capacity=capacity, load=load)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

"""Restore: make an instance from a snapshot, fetched from the object store if this node lacks it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from dumont.errors import DataLoss, DumontError, FailedPrecondition, ResourceExhausted
from snapshotd import compatibility
from snapshotd.gpu import placement
from snapshotd.images.missing_mounts import without_mounts
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node, Subject, uses_cuda
from snapshotd.jobs.executor import Action, Step
from snapshotd.model import MappedFile, Model, Snapshot, Weights
from snapshotd.ports import Host

log = structlog.get_logger(__name__)

# Why a restore is tried again with another shim, once: CRIU, or the shim itself, was killed at it.
KILLED = frozenset({"CRIU_LOST", "HOST_LOST"})


@dataclass(frozen=True)
class LocalWeights:
    """The weights of a restored process on this node.

    Attributes:
        cached: the digest of each weight file in the node's cache, by file name.
        mapped: the model's own weight files, if the process maps those instead.
        digest: of all weight files.
    """

    cached: Mapping[str, str]
    mapped: tuple[MappedFile, ...]
    digest: str


def restore(
    node: Node, subject: Subject, snapshot: Snapshot, fetch: Action | None = None, gpu: str = ""
) -> list[Step]:
    """The steps of a restore.

    Args:
        fetch: fetches the snapshot to this node; None if it is here.
        gpu: UUID or index of the GPU to restore on; empty for the one with the most free memory.
    """
    instance = subject.instance
    manifest = snapshot.manifest
    uuids = node.gpu_uuids()
    source = manifest.gpu or next(iter(manifest.gpus), "")
    detached = manifest.weights is Weights.DETACHED
    bringing: asyncio.Task[LocalWeights] | None = None
    origin = Path()

    async def check_facts() -> None:
        nonlocal bringing
        if snapshot.quarantine_reason:
            raise FailedPrecondition(
                "SNAPSHOT_QUARANTINED",
                f"snapshots/{manifest.id} is quarantined: {snapshot.quarantine_reason}",
                metadata={"snapshot": manifest.id},
            )
        captured = {name: fact for name, fact in manifest.compatibility.items() if name != "weights"}
        compatibility.check(manifest.id, captured, node.facts_of(manifest.device, manifest.engine))
        if uses_cuda(manifest.device):
            actions.check_suspendable(node, manifest.device)
            subject.instance = replace(subject.instance, gpu=place())
        node.store.pin(instance.id, manifest.id)
        if detached:
            # Runs while the image is fetched and verified.
            bringing = asyncio.create_task(cache_weights(), name=f"weights of {instance.id}")
        elif (model := await node.models.find(manifest.model, manifest.engine)) is not None:
            # The process needs no file of the model. But if the model here has changed, a snapshot of the
            # old one is not what the caller wants.
            await check_files(model)

    def place() -> str:
        places = placement.arrange(manifest.gpus, uuids)
        home = placement.named(actions.gpus_of(node).devices, places.get(source, source))
        return actions.reserve_gpu(node, subject.instance, home, gpu, manifest.gpu_bytes)

    async def cache_weights() -> LocalWeights:
        model = await node.models.resolve(manifest.model, manifest.engine)
        await check_files(model)
        cached = await node.weights.pin(instance.id, model) if manifest.weight_files else {}
        mapped = () if manifest.weight_files else await node.weights.mapped(model)
        return LocalWeights(cached, mapped, await node.weights.digest(model))

    async def check_files(model: Model) -> None:
        # Older snapshots do not record them.
        if manifest.model_files:
            here = await actions.digests(node, model, manifest.engine_options)
            compatibility.check_model(manifest.id, manifest.model, manifest.model_files, here)

    async def let_go() -> None:
        if bringing is not None:
            bringing.cancel()
            await asyncio.gather(bringing, return_exceptions=True)
        node.weights.unpin(instance.id)
        await node.store.unpin(instance.id)

    async def check_weights() -> None:
        assert bringing is not None
        brought = await bringing
        captured = {"weights": manifest.compatibility["weights"]}
        compatibility.check(manifest.id, captured, {"weights": brought.digest})
        if brought.cached != manifest.weight_files:
            raise ResourceExhausted(
                "WEIGHTS_NOT_CACHED",
                f"snapshots/{manifest.id} maps its weights from the node's weight cache, and this node has "
                "none or no room in it; raise --weight-cache-bytes, or stop instances of other models",
                metadata={"snapshot": manifest.id},
            )
        subject.instance = replace(subject.instance, weight_files=brought.cached, mapped_files=brought.mapped)

    async def verify() -> None:
        nonlocal origin
        try:
            origin = await node.store.images(snapshot)
            await node.store.verify(snapshot)
        except DataLoss as error:
            await node.store.quarantine(manifest.id, f"{error.reason}: {error.message}")
            raise

    async def restore_process() -> None:
        directory, images, mounts = node.instance_directory(instance.id), origin, manifest.mounts
        if absent := set(mounts) - node.hosts.mounts():
            images = directory / "images"
            await asyncio.to_thread(without_mounts, node.images, origin, absent, images)
            mounts = tuple(mount for mount in mounts if mount not in absent)

        async def attempt() -> Host:
            subject.host = host = await node.hosts.take()
            await host.restore(
                instance.id, directory, images, origin, mounts, manifest.pipes, node.deadlines.restore
            )
            return host

        try:
            host = await attempt()
        except DumontError as error:
            # Somebody killed CRIU, or the kernel did for want of memory. That says nothing of the snapshot.
            if error.reason not in KILLED:
                raise
            log.warning("restore_repeated", instance=instance.id, reason=error.reason, error=error.message)
            await actions.release(subject)
            host = await attempt()
        subject.instance = replace(
            subject.instance,
            pid=host.pid,
            device=manifest.device,
            canary=manifest.canary,
            versions=manifest.compatibility,
            weights=manifest.weights,
            weights_digest=manifest.compatibility["weights"],
            model_files=manifest.model_files,
        )

    async def resume_cuda() -> None:
        devices = placement.device_map(manifest.gpus, uuids, source, subject.instance.gpu)
        await actions.resume_cuda(node, subject, devices)

    async def wake() -> None:
        await actions.wake(node, subject)

    async def canary() -> None:
        answer = actions.canary_of(await actions.host_of(subject).call("canary", node.deadlines.canary))
        if not manifest.canary.agrees(answer):
            reason = f"its canary answered {answer.tokens[:8]}…, not {manifest.canary.tokens[:8]}…"
            await node.store.quarantine(manifest.id, reason)
            raise DataLoss(
                "CANARY_MISMATCH",
                f"snapshots/{manifest.id} came back answering wrongly and is quarantined: {reason}",
                metadata={"snapshot": manifest.id},
            )

    async def serve() -> None:
        await actions.serve(node, subject)

    return [
        Step("check", check_facts, let_go),
        *([Step("fetch", fetch)] if fetch else []),
        Step("verify", verify),
        *([Step("weights", check_weights)] if detached else []),
        actions.directory_step(node, instance),
        Step("criu", restore_process, lambda: actions.release(subject)),
        *([Step("cuda_restore", resume_cuda)] if uses_cuda(manifest.device) else []),
        Step("wake", wake),
        Step("canary", canary),
        Step("serve", serve),
    ]

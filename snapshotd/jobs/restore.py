"""Restore: make an instance from a snapshot, fetched from the object store if this node lacks it."""

from __future__ import annotations

from dataclasses import replace

from dumont.errors import DataLoss, FailedPrecondition
from snapshotd import compatibility, placement
from snapshotd.executor import Action, Step
from snapshotd.jobs import moves
from snapshotd.model import Snapshot
from snapshotd.node import Node, Subject, uses_cuda


def restore(
    node: Node, subject: Subject, snapshot: Snapshot, fetch: Action | None = None, gpu: str = ""
) -> list[Step]:
    """Make an instance from a snapshot.

    Args:
        fetch: brings the snapshot to this node; None: it is here.
        gpu: UUID or index of the GPU to come back on; empty: where there is most room.
    """
    instance = subject.instance
    manifest = snapshot.manifest
    uuids = [known.uuid for known in node.gpus]
    source = manifest.gpu or next(iter(manifest.gpus), "")

    async def check_facts() -> None:
        if snapshot.quarantine_reason:
            raise FailedPrecondition(
                "SNAPSHOT_QUARANTINED",
                f"snapshots/{manifest.id} is quarantined: {snapshot.quarantine_reason}",
                metadata={"snapshot": manifest.id},
            )
        model = await node.models.resolve(manifest.model, manifest.engine)
        digest = await node.models.weights_digest(model)
        here = {**node.facts_of(manifest.device), "weights": digest}
        compatibility.check(manifest.id, manifest.compatibility, here)
        if uses_cuda(manifest.device):
            moves.check_unshared(node, manifest.device)
            subject.instance = replace(subject.instance, gpu=place())

    def place() -> str:
        places = placement.arrange(manifest.gpus, uuids)
        home = placement.named(node.gpus, places.get(source, source))
        return moves.find_room(node, subject.instance, home, gpu, manifest.gpu_bytes)

    async def verify() -> None:
        try:
            await node.store.verify(snapshot)
        except DataLoss as error:
            await node.store.quarantine(manifest.id, error.message)
            raise

    async def bring_back() -> None:
        subject.host = await node.hosts.take()
        await subject.host.restore(
            instance.id,
            node.instance_directory(instance.id),
            node.store.images(snapshot),
            manifest.mounts,
            manifest.pipes,
            node.deadlines.restore,
        )
        subject.instance = replace(
            subject.instance,
            pid=subject.host.pid,
            device=manifest.device,
            canary=manifest.canary,
            versions=manifest.compatibility,
            weights_digest=manifest.compatibility["weights"],
        )

    async def revive() -> None:
        devices = placement.device_map(manifest.gpus, uuids, source, subject.instance.gpu)
        await moves.revive_cuda(node, subject, devices)

    async def wake() -> None:
        await moves.wake(node, subject)

    async def canary() -> None:
        answer = moves.canary_of(await moves.host_of(subject).call("canary", node.deadlines.canary))
        if not manifest.canary.agrees(answer):
            reason = f"its canary answered {answer.tokens[:8]}…, not {manifest.canary.tokens[:8]}…"
            await node.store.quarantine(manifest.id, reason)
            raise DataLoss(
                "CANARY_MISMATCH",
                f"snapshots/{manifest.id} came back answering wrongly and is quarantined: {reason}",
                metadata={"snapshot": manifest.id},
            )

    async def serve() -> None:
        await moves.serve(node, subject)

    return [
        Step("check", check_facts),
        *([Step("fetch", fetch)] if fetch else []),
        Step("verify", verify),
        moves.directory_step(node, instance),
        Step("criu", bring_back, lambda: moves.release(subject)),
        *([Step("cuda_restore", revive)] if uses_cuda(manifest.device) else []),
        Step("wake", wake),
        Step("canary", canary),
        Step("serve", serve),
    ]

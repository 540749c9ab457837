"""Start: load a model in a new process."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from snapshotd.executor import Step
from snapshotd.jobs import moves
from snapshotd.model import Model, Phase, Weights
from snapshotd.node import Node, Subject
from snapshotd.shim.mounts import WEIGHTS_MOUNT


def start(node: Node, subject: Subject, model: Model) -> list[Step]:
    """Load a model in a new process."""
    instance = subject.instance
    found = model

    async def fetch() -> None:
        nonlocal found
        found = await node.models.fetch(model)

    async def bring_weights() -> None:
        # Those that the process is to carry itself, it copies once from their own files.
        if instance.weights is Weights.DETACHED:
            files = await node.weights.hold(instance.id, found)
            subject.instance = replace(subject.instance, weight_files=files)

    async def release_weights() -> None:
        node.weights.release(instance.id)

    async def launch() -> None:
        subject.host = await node.hosts.take()
        await subject.host.launch(
            instance.id,
            node.instance_directory(instance.id),
            node.settings.command,
            node.settings.environment,
        )
        subject.instance = replace(subject.instance, pid=subject.host.pid)

    async def load() -> None:
        # Unless they are cached, the digest is read beside the load: both want the same file's pages.
        digest = asyncio.create_task(node.weights.digest(found))
        try:
            loaded = await moves.host_of(subject).call(
                "load",
                node.deadlines.load,
                model_dir=str(found.directory),
                engine=found.engine,
                device=node.settings.device,
                weights=instance.weights.value,
                weight_files={
                    name: f"{WEIGHTS_MOUNT}/{digest}"
                    for name, digest in subject.instance.weight_files.items()
                },
                **await moves.loader_of(node, subject, node.settings.device),
                max_queue=node.settings.max_queue,
                max_new_tokens_limit=node.settings.max_new_tokens,
            )
        except BaseException:
            digest.cancel()
            raise
        subject.instance = replace(
            subject.instance,
            engine=loaded["engine"],
            device=loaded["device"],
            canary=moves.canary_of(loaded["canary"]),
            versions=loaded["versions"],
            weights_digest=await digest,
        )
        subject.load_parts = tuple(Phase(f"load.{name}", seconds) for name, seconds in loaded["phases"])

    async def serve() -> None:
        await moves.serve(node, subject)

    return [
        Step("fetch", fetch),
        Step("weights", bring_weights, release_weights),
        moves.directory_step(node, instance),
        Step("launch", launch, lambda: moves.release(subject)),
        Step("load", load),
        Step("serve", serve),
    ]

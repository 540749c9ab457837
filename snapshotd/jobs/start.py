"""Start: load a model in a new process."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from snapshotd.gpu import placement
from snapshotd.jobs import actions
from snapshotd.jobs.context import Node, Subject, uses_cuda
from snapshotd.jobs.executor import Step
from snapshotd.model import Model, Phase, Weights
from snapshotd.system.mounts import WEIGHTS_MOUNT

# The driver's variable that makes a process see one GPU alone, as device 0, even after it moves to another.
VISIBLE = "CUDA_VISIBLE_DEVICES"


def start(node: Node, subject: Subject, model: Model, gpu: str = "") -> list[Step]:
    """The steps of a start.

    Args:
        gpu: UUID or index of the GPU to load the model on; empty for the one with the most free memory.
    """
    instance = subject.instance
    found = model

    async def fetch() -> None:
        nonlocal found
        found = await node.models.fetch(model)
        # Before anything is read of it: what changes from now on is not what the process has.
        files = await actions.digests(node, found, instance.engine_options)
        subject.instance = replace(subject.instance, model_files=files)

    async def cache_weights() -> None:
        # Weights that are to be included in the process are copied once, from the model's own files.
        if instance.weights is Weights.DETACHED:
            files = await node.weights.pin(instance.id, found)
            mapped = () if files else await node.weights.mapped(found)
            subject.instance = replace(subject.instance, weight_files=files, mapped_files=mapped)

    async def unpin_weights() -> None:
        node.weights.unpin(instance.id)

    async def launch() -> None:
        command, environment = node.settings.program(found.engine)
        subject.host = await node.hosts.take()
        await subject.host.launch(
            instance.id,
            node.instance_directory(instance.id),
            command,
            {**environment, **choose_gpu()},
            found.engine if node.settings.engine(found.engine) else "",
        )
        subject.instance = replace(subject.instance, pid=subject.host.pid)

    def choose_gpu() -> dict[str, str]:
        """The environment that shows the process its GPU; empty where this node does not choose one."""
        if node.gpus is None:
            if gpu:
                placement.named((), gpu)
            return {}
        if not gpu and _divided(node):
            return {}
        chosen = actions.reserve_gpu(node, instance, None, gpu, model.weights_bytes)
        subject.instance = replace(subject.instance, gpu=chosen)
        return {VISIBLE: chosen}

    async def load() -> None:
        # Unless the weights are cached, they are hashed during the load, because both read the same pages.
        digest = asyncio.create_task(node.weights.digest(found))
        try:
            loaded = await actions.host_of(subject).call(
                "load",
                node.deadlines.load,
                model_dir=str(found.directory),
                engine=found.engine,
                engine_options=dict(instance.engine_options),
                device=node.settings.device,
                weights=instance.weights.value,
                weight_files={
                    name: f"{WEIGHTS_MOUNT}/{digest}"
                    for name, digest in subject.instance.weight_files.items()
                },
                **await actions.loader_of(node, subject),
                max_queue=node.settings.max_queue,
                max_new_tokens_limit=node.settings.max_new_tokens,
            )
        except BaseException:
            digest.cancel()
            raise
        subject.instance = replace(
            actions.with_load(subject.instance, loaded),
            engine=loaded["engine"],
            device=loaded["device"],
            gpu=subject.instance.gpu if uses_cuda(loaded["device"]) else "",
            canary=actions.canary_of(loaded["canary"]),
            versions=loaded["versions"],
            weights_digest=await digest,
        )
        subject.load_parts = tuple(Phase(f"load.{name}", seconds) for name, seconds in loaded["phases"])

    async def serve() -> None:
        await actions.serve(node, subject)

    return [
        Step("fetch", fetch),
        Step("weights", cache_weights, unpin_weights),
        actions.directory_step(node, instance),
        Step("launch", launch, lambda: actions.release(subject)),
        Step("load", load),
        Step("serve", serve),
    ]


def _divided(node: Node) -> bool:
    """Whether a GPU is divided by MIG. Its parts have UUIDs of their own, and the driver chooses one."""
    return node.gpus is not None and any(part.kind == "MIG" for part in node.gpus.status.sharing())

"""Nodes that do what snapshotd does, as far as the controller can see it, and take as long.

Groups of nodes share an object store. At the beginning each deployment has a snapshot, captured on one node
and published in the store of its group.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Final

from controller.model import (
    Captured,
    Gpu,
    InstanceState,
    Node,
    Phase,
    Report,
    Snapshot,
    Weights,
)
from controller.ports import Change, ListedSnapshots, Removed, Synchronized
from controller.simulation.figures import Machine, Model, draw
from dumont.errors import FailedPrecondition, NotFound, ResourceExhausted

# Nodes that share an object store.
GROUP: Final = 20
# A fetch checks and unpacks what it reads.
FETCH_OVERHEAD: Final = 1.25


@dataclass(slots=True)
class SimulatedNode:
    """The truth about one node.

    Attributes:
        used: bytes in use of each GPU, by UUID.
        weights: bytes of the weights in memory by deployment, the one that was used longest ago first.
    """

    id: str
    store: str
    used: dict[str, int]
    instances: dict[str, Report] = field(default_factory=dict)
    held: dict[str, Snapshot] = field(default_factory=dict)
    weights: OrderedDict[str, int] = field(default_factory=OrderedDict)
    watchers: list[asyncio.Queue[Change]] = field(default_factory=list)

    def tell(self, report: Report) -> None:
        """An instance is now as in this report."""
        self.instances[report.id] = report
        for queue in self.watchers:
            queue.put_nowait(report)


class SimulatedNodes:
    """The ``Nodes`` port, as far as a controller needs it to start, park, resume, restore and stop.

    Args:
        machine: what each node is like.
        count: how many nodes there are.
        gpus: GPUs of each node.
        models: of each deployment, by the deployment's id.
        seed: of the random durations.
    """

    def __init__(self, machine: Machine, count: int, gpus: int, models: dict[str, Model], seed: int) -> None:
        self._machine = machine
        self._models = models
        self._generator = random.Random(seed)
        self._published: dict[str, dict[str, Snapshot]] = {}
        self._measured_at = 0.0
        self._used = 0
        # Bytes of GPU memory in use, times seconds.
        self.byte_seconds = 0.0
        self.nodes: dict[str, SimulatedNode] = {}
        for number in range(count):
            name = f"node-{number:04}"
            store = f"s3://group-{number // GROUP}"
            self.nodes[name] = SimulatedNode(name, store, {f"{name}-gpu-{gpu}": 0 for gpu in range(gpus)})
            self._published.setdefault(store, {})
        for number, (deployment, model) in enumerate(models.items()):
            self._capture(list(self.nodes.values())[number % count], deployment, model)

    def _capture(self, node: SimulatedNode, deployment: str, model: Model) -> None:
        snapshot = Snapshot(
            f"{deployment}-s",
            deployment,
            node.id,
            create_time=1.0,
            model=model.name,
            size_bytes=model.image_bytes,
            manifest_digest=f"digest of {deployment}",
            published=True,
            engine="causal_lm",
            device="cuda:0",
            gpu_bytes=model.gpu_bytes,
        )
        node.held[snapshot.id] = snapshot
        self._published[node.store][snapshot.id] = snapshot
        self._keep_weights(node, deployment)

    def facts(self, node: SimulatedNode) -> Node:
        """What the node reports of itself."""
        return Node(
            node.id,
            "simulated",
            gpu_models=("simulated",) * len(node.used),
            memory_total_bytes=self._machine.node_memory_bytes,
            memory_available_bytes=self._machine.node_memory_bytes,
            checkpoint_capable=True,
            object_store=node.store,
            gpus=self.gpus(node),
            instance_memory_limit_bytes=self._machine.node_memory_bytes,
            parked_memory_limit_bytes=self._machine.parked_memory_bytes,
        )

    def gpus(self, node: SimulatedNode) -> tuple[Gpu, ...]:
        """Its GPUs as they are now."""
        total = self._machine.gpu_bytes
        return tuple(Gpu(uuid, "simulated", total, total - used) for uuid, used in node.used.items())

    def captured(self, uids: dict[str, str]) -> tuple[Captured, ...]:
        """The records of all captures. ``uids`` are those of the deployments, by id."""
        return tuple(
            Captured(s.id, s.deployment, uids[s.deployment], s.manifest_digest, s.node)
            for node in self.nodes.values()
            for s in node.held.values()
        )

    def settle(self) -> None:
        """Count the GPU memory in use until now."""
        now = asyncio.get_running_loop().time()
        self.byte_seconds += self._used * (now - self._measured_at)
        self._measured_at = now

    def _take(self, node: SimulatedNode, gpu: str, size: int) -> str:
        """Take memory of a GPU (empty: of the one with the most) or, with a negative size, give it back.

        Raises:
            ResourceExhausted: GPU_MEMORY.
        """
        gpu = gpu or min(node.used, key=lambda uuid: (node.used[uuid], uuid))
        free = self._machine.gpu_bytes - node.used[gpu]
        if size > free:
            raise ResourceExhausted(
                "GPU_MEMORY", f"{gpu} has {free >> 20} MiB free and the process needs {size >> 20}"
            )
        self.settle()
        node.used[gpu] += size
        self._used += size
        return gpu

    def _keep_weights(self, node: SimulatedNode, deployment: str) -> float:
        """Have the weights in memory; the seconds that it takes."""
        size = self._models[deployment].weights_bytes
        known = deployment in node.weights
        node.weights[deployment] = size
        node.weights.move_to_end(deployment)
        while sum(node.weights.values()) > self._machine.weight_cache_bytes and len(node.weights) > 1:
            node.weights.popitem(last=False)
        return 0.0 if known else size / self._machine.disk_bytes_per_second

    # The port, whose methods ``ports.Nodes`` documents

    async def connect(self, node: str, endpoint: str) -> None:
        return None

    async def disconnect(self, node: str) -> None:
        return None

    async def watch(self, node: str) -> AsyncGenerator[Change]:
        known = self.nodes[node]
        queue: asyncio.Queue[Change] = asyncio.Queue()
        known.watchers.append(queue)
        try:
            for report in list(known.instances.values()):
                yield report
            yield Synchronized()
            while True:
                yield await queue.get()
        finally:
            known.watchers.remove(queue)

    async def get_instance(self, node: str, instance: str) -> Report:
        return self._find(node, instance)

    async def list_snapshots(self, node: str) -> ListedSnapshots:
        known = self.nodes[node]
        remote = (
            replace(snapshot, node=node, local=False)
            for snapshot in self._published[known.store].values()
            if snapshot.id not in known.held
        )
        return ListedSnapshots((*known.held.values(), *remote))

    async def start(
        self,
        node: str,
        instance: str,
        deployment: str,
        model: str,
        engine: str,
        weights: Weights,
        engine_options: object,
        gpu: str = "",
    ) -> Report:
        known = self.nodes[node]
        seconds = draw(self._models[deployment].cold, self._generator)
        phases = (Phase("weights", self._keep_weights(known, deployment)), Phase("load", seconds))
        return await self._create(known, Report(instance, deployment, InstanceState.STARTING), gpu, phases)

    async def restore(
        self, node: str, instance: str, deployment: str, snapshot: str, manifest_digest: str, gpu: str = ""
    ) -> Report:
        known, model = self.nodes[node], self._models[deployment]
        found = known.held.get(snapshot) or self._published[known.store].get(snapshot)
        if found is None:
            raise NotFound("SNAPSHOT_NOT_FOUND", f"there is no snapshots/{snapshot}")
        fetch = 0.0
        if snapshot not in known.held:
            fetch = model.image_bytes / self._machine.store_bytes_per_second * FETCH_OVERHEAD
        phases = (
            Phase("fetch", fetch),
            Phase("weights", self._keep_weights(known, deployment)),
            Phase("criu", draw(model.restore, self._generator)),
        )
        report = Report(instance, deployment, InstanceState.STARTING, snapshot)
        made = await self._create(known, report, gpu, phases)
        known.held[snapshot] = replace(found, node=node, local=True)
        return made

    async def _create(
        self, node: SimulatedNode, report: Report, gpu: str, phases: tuple[Phase, ...]
    ) -> Report:
        model = self._models[report.deployment]
        report = replace(report, model=model.name, device="cuda:0", create_time=self._now())
        gpu = self._take(node, gpu, model.gpu_bytes)
        node.tell(report)
        try:
            await asyncio.sleep(sum(phase.seconds for phase in phases))
        except asyncio.CancelledError:
            self._take(node, gpu, -model.gpu_bytes)
            node.tell(replace(report, state=InstanceState.FAILED))
            raise
        serving = replace(
            report,
            state=InstanceState.SERVING,
            phases=phases,
            gpu=gpu,
            gpu_bytes=model.gpu_bytes,
            ram_bytes=model.image_bytes,
        )
        node.tell(serving)
        return serving

    async def park(self, node: str, instance: str) -> Report:
        report = self._expect(node, instance, InstanceState.SERVING)
        model = self._models[report.deployment]
        self.nodes[node].tell(replace(report, state=InstanceState.PARKING))
        await asyncio.sleep(draw(model.park, self._generator))
        self._take(self.nodes[node], report.gpu, -model.gpu_bytes)
        parked = replace(report, state=InstanceState.PARKED)
        self.nodes[node].tell(parked)
        return parked

    async def resume(self, node: str, instance: str, gpu: str = "") -> Report:
        report = self._expect(node, instance, InstanceState.PARKED)
        model = self._models[report.deployment]
        gpu = self._take(self.nodes[node], gpu or report.gpu, model.gpu_bytes)
        self.nodes[node].tell(replace(report, state=InstanceState.RESUMING))
        seconds = draw(model.resume, self._generator)
        await asyncio.sleep(seconds)
        phases = (Phase("cuda_restore", seconds),)
        serving = replace(report, state=InstanceState.SERVING, gpu=gpu, phases=phases)
        self.nodes[node].tell(serving)
        return serving

    async def move(self, node: str, instance: str, gpu: str) -> Report:
        report = self._expect(node, instance, InstanceState.SERVING)
        model = self._models[report.deployment]
        target = self._take(self.nodes[node], gpu, model.gpu_bytes)
        park, resume = draw(model.park, self._generator), draw(model.resume, self._generator)
        await asyncio.sleep(park + resume)
        self._take(self.nodes[node], report.gpu, -model.gpu_bytes)
        moved = replace(report, gpu=target, phases=(Phase("cuda_restore", resume),))
        self.nodes[node].tell(moved)
        return moved

    async def stop(self, node: str, instance: str) -> None:
        report = self._find(node, instance)
        if report.state is InstanceState.SERVING:
            self._take(self.nodes[node], report.gpu, -self._models[report.deployment].gpu_bytes)
        self.nodes[node].tell(replace(report, state=InstanceState.STOPPING))
        await asyncio.sleep(self._machine.stop_seconds)
        del self.nodes[node].instances[instance]
        for queue in self.nodes[node].watchers:
            queue.put_nowait(Removed(instance))

    async def delete_snapshot(self, node: str, snapshot: str) -> None:
        known = self.nodes[node]
        held = known.held.pop(snapshot, None)
        if self._published[known.store].pop(snapshot, None) is None and held is None:
            raise NotFound("SNAPSHOT_NOT_FOUND", f"there is no snapshots/{snapshot}")

    def generate(self, node: str, request: bytes, timeout: float | None) -> SimulatedFrames:
        instance, tokens = request.decode().split()
        model = self._models[self._expect(node, instance, InstanceState.SERVING).deployment]
        return SimulatedFrames(model.first_token, int(tokens) / model.tokens_per_second)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _find(self, node: str, instance: str) -> Report:
        report = self.nodes[node].instances.get(instance)
        if report is None:
            raise NotFound("INSTANCE_NOT_FOUND", f"there is no instances/{instance}")
        return report

    def _expect(self, node: str, instance: str, state: InstanceState) -> Report:
        report = self._find(node, instance)
        if report.state is not state:
            raise FailedPrecondition(
                "ILLEGAL_TRANSITION", f"instances/{instance} is {report.state.name}, not {state.name}"
            )
        return report


class SimulatedFrames:
    """An answer of two frames: the first token, and the rest."""

    def __init__(self, first: float, rest: float) -> None:
        self._seconds = [first, rest]

    async def read(self) -> bytes | None:
        if not self._seconds:
            return None
        await asyncio.sleep(self._seconds.pop(0))
        return b"frame"

    def cancel(self) -> None:
        return None

"""A node: what its jobs work with, and the instance that a job works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from snapshotd.gpu.placement import Reservations
from snapshotd.images.format import ImageFormat
from snapshotd.model import Gpu, Instance, Phase
from snapshotd.ports import (
    Clock,
    Cuda,
    GpuStatus,
    Host,
    Hosts,
    Models,
    SnapshotStore,
    WeightFiles,
    WeightLoader,
)
from snapshotd.system.process_tree import process_tree


@dataclass(frozen=True)
class Deadlines:
    """Seconds after which a step counts as failed."""

    load: float = 1800.0
    drain: float = 30.0
    quiesce: float = 30.0
    cuda_lock: float = 10.0
    dump: float = 600.0
    restore: float = 120.0
    wake: float = 60.0
    canary: float = 60.0
    serve: float = 10.0


@dataclass(frozen=True)
class HostSettings:
    """How model hosts run on this node. From the node's configuration, never from a snapshot."""

    command: Sequence[str]
    environment: Mapping[str, str]
    device: str = "auto"
    max_queue: int = 64
    max_new_tokens: int = 4096


@dataclass(frozen=True)
class Node:
    """What the jobs work with."""

    hosts: Hosts
    store: SnapshotStore
    models: Models
    weights: WeightFiles
    images: ImageFormat
    clock: Clock
    settings: HostSettings
    facts: Mapping[str, str]
    directory: Path
    threads: int
    deadlines: Deadlines = field(default_factory=Deadlines)
    # None on a node without GPUs.
    cuda: Cuda | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_facts: Mapping[str, str] = field(default_factory=dict)
    gpu_status: GpuStatus | None = None
    loader: WeightLoader | None = None
    reservations: Reservations = field(default_factory=Reservations)
    # A process and its descendants.
    process_tree: Callable[[int], Sequence[int]] = process_tree

    def facts_of(self, device: str) -> dict[str, str]:
        """What a process on ``device`` is bound to here."""
        return {**self.facts, **(self.gpu_facts if uses_cuda(device) else {})}

    def instance_directory(self, instance: str) -> Path:
        return self.directory / "instances" / instance


def uses_cuda(device: str) -> bool:
    return device.startswith("cuda")


class Subject(Protocol):
    """The instance that a job works on."""

    instance: Instance
    host: Host | None
    load_parts: tuple[Phase, ...]

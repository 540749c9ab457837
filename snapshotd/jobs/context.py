"""What jobs work with: the node's collaborators, and the instance that a job is about."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dumont.engines import INSTALLED
from dumont.errors import FailedPrecondition
from snapshotd.gpu.placement import Reservations
from snapshotd.images.format import ImageFormat
from snapshotd.model import Engine, Gpu, Instance, Phase
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
from snapshotd.system import linux
from snapshotd.system.disk import DiskReservations
from snapshotd.system.mounts import engine_mount
from snapshotd.system.process_tree import process_tree


@dataclass(frozen=True)
class Deadlines:
    """Seconds after which a step of a job has failed."""

    # All of a start or restore together, the model's download too.
    start: float = 1800.0
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
    """How model hosts run on this node, by the node's configuration, never by a snapshot."""

    command: Sequence[str]
    environment: Mapping[str, str]
    device: str = "auto"
    max_queue: int = 64
    max_new_tokens: int = 4096
    # The engines that this node has beside those of its own interpreter, by name.
    engines: Mapping[str, Engine] = field(default_factory=dict)
    # A directory with nothing but the packages that a model host needs of ours, for those interpreters.
    packages: Path = Path()

    def engine(self, name: str) -> Engine | None:
        """An engine under an interpreter of its own; None for one that runs under this node's own.

        Raises:
            FailedPrecondition: ENGINE_NOT_INSTALLED.
        """
        if name not in INSTALLED:
            return None
        if name not in self.engines:
            raise FailedPrecondition(
                "ENGINE_NOT_INSTALLED",
                f"this node does not have the engine {name}; run 'dumont engine install {name}' on it, or "
                f"name its interpreter with --engine-python {name}=PATH, and start snapshotd again",
                field="engine",
                metadata={"engine": name},
            )
        return self.engines[name]

    def program(self, engine: str) -> tuple[Sequence[str], Mapping[str, str]]:
        """The command of an engine's model host, and its environment.

        Raises:
            FailedPrecondition: ENGINE_NOT_INSTALLED.
        """
        own = self.engine(engine)
        if own is None:
            return self.command, self.environment
        python = Path(engine_mount(engine)) / own.program
        environment = {
            **self.environment,
            "PATH": f"{python.parent}{os.pathsep}{self.environment.get('PATH', os.defpath)}",
            # Ours alone: this node's own packages must not take the place of the engine's.
            "PYTHONPATH": str(self.packages),
        }
        return (str(python), *self.command[1:]), environment


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a node, and what drives them.

    Attributes:
        devices: in the driver's order; at least one.
        facts: what a snapshot of a CUDA process is bound to.
        cuda: None if nothing here can suspend CUDA processes, which can then only start, serve and stop.
        unsuspendable: why, and how to change that.
        loader: None if model hosts copy their weights to a GPU themselves.
        reservations: GPU memory set aside for jobs under way.
    """

    devices: tuple[Gpu, ...]
    facts: Mapping[str, str]
    status: GpuStatus
    cuda: Cuda | None
    loader: WeightLoader | None = None
    reservations: Reservations = field(default_factory=Reservations)
    unsuspendable: str = ""

    def free(self, gpu: str) -> int:
        """Bytes of a GPU, by its UUID, that are neither in use nor reserved."""
        return self.status.free(gpu) - self.reservations.reserved(gpu)


@dataclass(frozen=True)
class Node:
    """The collaborators of all jobs on this node."""

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
    # None on a node that uses no GPU.
    gpus: Gpus | None = None
    disk: DiskReservations = field(default_factory=DiskReservations)
    # Bytes that a process has written to and that belong to no file.
    anonymous_memory: Callable[[int], int] = linux.anonymous_memory
    # The pids of a process and its descendants.
    process_tree: Callable[[int], Sequence[int]] = process_tree

    def facts_of(self, device: str, engine: str) -> dict[str, str]:
        """The facts of this node that a process of ``engine`` on ``device`` is bound to.

        Raises:
            FailedPrecondition: ENGINE_NOT_INSTALLED.
        """
        own = self.settings.engine(engine)
        return {
            **self.facts,
            **(own.facts if own else {}),
            **(self.gpus.facts if self.gpus and uses_cuda(device) else {}),
        }

    def gpu_uuids(self) -> list[str]:
        """The UUIDs of the node's GPUs, in the driver's order."""
        return [gpu.uuid for gpu in self.gpus.devices] if self.gpus else []

    def instance_directory(self, instance: str) -> Path:
        """Where the files of an instance are."""
        return self.directory / "instances" / instance


def uses_cuda(device: str) -> bool:
    """Whether a process on ``device``, as torch names it, uses CUDA."""
    return device.startswith("cuda")


class Subject(Protocol):
    """The instance that a job is about, as far as its steps read and change it."""

    instance: Instance
    host: Host | None
    load_parts: tuple[Phase, ...]

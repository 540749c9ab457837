"""The facts of a node: instances, snapshots and models. Frozen; nothing here does anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from pathlib import Path
from typing import Any


class State(Enum):
    """Where an instance is in its life."""

    STARTING = auto()
    RESTORING = auto()
    SERVING = auto()
    CAPTURING = auto()
    PARKING = auto()
    PARKED = auto()
    RESUMING = auto()
    STOPPING = auto()
    FAILED = auto()
    GONE = auto()


class Weights(Enum):
    """Where the weights of a process are when it is captured.

    ``DETACHED``: in the files that it maps, and left out of its snapshots. ``INCLUDED``: in its own memory,
    and so in its snapshots.
    """

    DETACHED = "detached"
    INCLUDED = "included"


@dataclass(frozen=True)
class Phase:
    """A named step and the seconds it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Canary:
    """What a model host must answer again after a restore.

    Attributes:
        tokens: likeliest token at every position of one synthetic prompt.
        logprob: log-probability of the last of them.
    """

    tokens: tuple[int, ...]
    logprob: float

    # Another GPU of the same model may round the last bits differently; a wrong weight moves it far more.
    TOLERANCE = 0.05

    def agrees(self, other: Canary) -> bool:
        return self.tokens == other.tokens and abs(self.logprob - other.logprob) <= self.TOLERANCE


@dataclass(frozen=True)
class Capacity:
    """What a model host takes at once. ``kv_tokens`` is None where its engine has no KV cache."""

    sequences: int
    kv_tokens: int | None = None


@dataclass(frozen=True)
class Load:
    """What a model host was at when it was asked last."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0


@dataclass(frozen=True)
class MappedFile:
    """A file that a process maps, as the file system knew it before."""

    path: str
    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Instance:
    """One model host. ``capacity`` is None while it has not told."""

    id: str
    deployment: str
    model: str
    engine: str
    state: State
    create_time: datetime
    pid: int = 0
    device: str = ""
    snapshot: str = ""
    phases: tuple[Phase, ...] = ()
    failure_reason: str = ""
    failure_message: str = ""
    weights: Weights = Weights.DETACHED
    weights_digest: str = ""
    # The digest of each weight file that it maps from the node's weight cache; empty: from the model's own.
    weight_files: Mapping[str, str] = field(default_factory=dict)
    # The model's own weight files that it maps: whoever writes to them changes what it answers.
    mapped_files: tuple[MappedFile, ...] = ()
    # The digest of each other file of the model that it has read.
    model_files: Mapping[str, str] = field(default_factory=dict)
    canary: Canary | None = None
    # UUID of the GPU it is on, or was on when it gave it up; inside it is always the same CUDA device.
    gpu: str = ""
    # Bytes it held there when it last gave it up.
    gpu_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    capacity: Capacity | None = None
    load: Load = Load()


@dataclass(frozen=True)
class Model:
    """A model that this node can load.

    Attributes:
        directory: where its files are; None while it must still be downloaded.
        weights: its weight files.
        context_length: tokens of prompt and answer together.
    """

    name: str
    engine: str
    directory: Path | None
    weights: tuple[Path, ...]
    weights_bytes: int
    context_length: int


@dataclass(frozen=True)
class Gpu:
    """A GPU of a node; memory in bytes."""

    uuid: str
    model: str
    memory_total: int


@dataclass(frozen=True)
class Sharing:
    """A way of sharing GPUs in which the driver cannot suspend a process.

    Attributes:
        kind: "MIG" or "MPS".
        gpu: UUID of the GPU; empty: all of the node's.
        message: what was found and how to end it.
    """

    kind: str
    gpu: str
    message: str


@dataclass(frozen=True)
class ImageFile:
    """One file of a snapshot."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a snapshot is: it exists when this is published.

    Attributes:
        compatibility: facts that must be equal where it is restored.
        mounts: names of the external mounts that the image refers to.
        pipes: inode of each pipe at capture, by role.
    """

    id: str
    deployment: str
    model: str
    engine: str
    device: str
    create_time: datetime
    source_pause_seconds: float
    phases: tuple[Phase, ...]
    canary: Canary
    compatibility: Mapping[str, str]
    mounts: tuple[str, ...]
    pipes: Mapping[str, int]
    files: tuple[ImageFile, ...]
    # UUIDs of the node's GPUs at capture, in the driver's order; empty for a process without CUDA.
    gpus: tuple[str, ...] = ()
    # The one of them that it was on; empty in older manifests: the first.
    gpu: str = ""
    # Bytes that its source held there while it served.
    gpu_bytes: int = 0
    weights: Weights = Weights.DETACHED
    # As its source had them: its process maps these very files again.
    weight_files: Mapping[str, str] = field(default_factory=dict)
    # The digest of each other file of the model: what its source has read of them is in its memory.
    model_files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A manifest, whether it may be restored, and where its files are: on this node, in the object store.

    Attributes:
        signer: the key that signed what this node fetched; empty: captured here, or not here.
    """

    manifest: Manifest
    digest: str
    quarantine_reason: str = ""
    local: bool = True
    published: bool = False
    signer: str = ""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.manifest.files)


@dataclass(frozen=True)
class CacheEntry:
    """What a snapshot takes on this node, in bytes, and when it was last used, in seconds since the epoch."""

    snapshot: str
    size: int
    last_use: float
    published: bool


@dataclass(frozen=True)
class Finding:
    """One check of the machine and what came of it.

    Attributes:
        needed: whether nothing works without; else models still run, and start cold.
    """

    check: str
    passed: bool
    message: str
    needed: bool = True


Json = dict[str, Any]

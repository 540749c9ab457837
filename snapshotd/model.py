"""The facts of a node: its instances, snapshots, models and GPUs. All are frozen values without behaviour."""

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

    ``DETACHED``: in files that the process maps, and left out of its snapshots. ``INCLUDED``: in its own
    memory, and therefore in its snapshots.
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
    """The answer to a fixed synthetic prompt, which a model host must give again after a restore.

    Attributes:
        tokens: the likeliest token at every position of the prompt.
        logprob: the log-probability of the last of them.
    """

    tokens: tuple[int, ...]
    logprob: float

    # Another GPU of the same model may round the last bits differently. A wrong weight differs far more.
    TOLERANCE = 0.05

    def agrees(self, other: Canary) -> bool:
        """Whether the tokens are the same and the probability is within the tolerance."""
        return self.tokens == other.tokens and abs(self.logprob - other.logprob) <= self.TOLERANCE


@dataclass(frozen=True)
class Capacity:
    """What a model host can take at once.

    Attributes:
        sequences: sequences that it computes at the same time.
        kv_tokens: tokens that its KV cache holds; None if its engine has no KV cache.
        unbatched_reason: why it computes sequences one after the other instead; empty if it does not.
    """

    sequences: int
    kv_tokens: int | None = None
    unbatched_reason: str = ""


@dataclass(frozen=True)
class Load:
    """The load of a model host when it was last asked.

    Attributes:
        running: sequences that it computes.
        waiting: requests in its queue.
        kv_tokens_used: tokens in its KV cache.
    """

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0


@dataclass(frozen=True)
class MappedFile:
    """A file that a process maps, as it was when it was first mapped."""

    path: str
    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Instance:
    """One model host.

    Attributes:
        snapshot: the snapshot it was restored from; empty if it was started.
        weight_files: the digest of each weight file that it maps from the node's weight cache; empty if it
            maps the model's own files.
        mapped_files: the model's own weight files that it maps. Whoever writes to them changes its answers.
        model_files: the digest of each other file of the model that it has read.
        gpu: UUID of the GPU it is on, or was on when it gave it up. Inside the process the CUDA device is
            always number 0.
        gpu_bytes: the GPU memory that it holds, as far as it was measured, or held when it was parked.
        capacity: None until the model host has reported it.
        engine_options: the arguments that its engine was given.
        paused: it has requests that go on when it resumes; set while it is moved.
    """

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
    weight_files: Mapping[str, str] = field(default_factory=dict)
    mapped_files: tuple[MappedFile, ...] = ()
    model_files: Mapping[str, str] = field(default_factory=dict)
    canary: Canary | None = None
    gpu: str = ""
    gpu_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    capacity: Capacity | None = None
    load: Load = Load()
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    paused: bool = False


@dataclass(frozen=True)
class Model:
    """A model that this node can load.

    Attributes:
        directory: where its files are; None if it must still be downloaded.
        weights: its weight files.
        context_length: the most tokens that a prompt and its answer may have together.
    """

    name: str
    engine: str
    directory: Path | None
    weights: tuple[Path, ...]
    weights_bytes: int
    context_length: int


@dataclass(frozen=True)
class Unservable:
    """A model that this node has and cannot serve, and why."""

    name: str
    problem: str


@dataclass(frozen=True)
class Engine:
    """An engine under an interpreter of its own.

    Attributes:
        python: the interpreter, as it was named.
        directory: its environment, which a model host sees at a fixed place.
        program: the interpreter's path within the environment.
        facts: the versions that a snapshot of it is bound to, by package.
    """

    name: str
    version: str
    python: Path
    directory: Path
    program: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Gpu:
    """A GPU of a node; memory in bytes."""

    uuid: str
    model: str
    memory_total: int


@dataclass(frozen=True)
class Budgets:
    """Bytes that this node has for its uses; 0 for no limit.

    Attributes:
        instances: memory of all instances together.
        parked: memory of those of them that are parked.
        snapshots: disk space of its own snapshots.
        weights: memory of the weights of running models; 0 if there is no weight cache.
        directory: of its own snapshots.
    """

    instances: int
    parked: int
    snapshots: int
    weights: int
    directory: Path


@dataclass(frozen=True)
class Sharing:
    """A way of sharing GPUs that keeps the driver from suspending processes.

    Attributes:
        kind: "MIG" or "MPS".
        gpu: UUID of the GPU; empty for all GPUs of the node.
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
    """The description of a snapshot, which exists once its manifest is published.

    Attributes:
        compatibility: facts that must be the same where it is restored.
        mounts: names of the external mounts that the image refers to.
        pipes: the inode of each pipe at capture, by role.
        gpus: UUIDs of the node's GPUs at capture, in the driver's order; empty for a process without CUDA.
        gpu: the GPU that its source was on; empty in older manifests, which mean the first one.
        gpu_bytes: GPU memory that its source held while it served.
        weight_files: as in :class:`Instance`; a restored process maps these very files again.
        model_files: the digest of each other file of the model. Their contents are in its memory.
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
    gpus: tuple[str, ...] = ()
    gpu: str = ""
    gpu_bytes: int = 0
    weights: Weights = Weights.DETACHED
    weight_files: Mapping[str, str] = field(default_factory=dict)
    model_files: Mapping[str, str] = field(default_factory=dict)
    engine_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A manifest, whether it may be restored, and where its files are.

    Attributes:
        quarantine_reason: why it must not be restored; empty if it may.
        local: this node has its files.
        published: the object store has its files.
        signer: the key that signed it, if this node fetched it; empty otherwise.
    """

    manifest: Manifest
    digest: str
    quarantine_reason: str = ""
    local: bool = True
    published: bool = False
    signer: str = ""

    @property
    def size(self) -> int:
        """Bytes of all image files."""
        return sum(file.size for file in self.manifest.files)


@dataclass(frozen=True)
class CacheEntry:
    """A snapshot on this node.

    Attributes:
        size: bytes that it takes on this node.
        last_use: in seconds since the epoch.
        published: the object store has it too, so it may be evicted.
    """

    snapshot: str
    size: int
    last_use: float
    published: bool


@dataclass(frozen=True)
class Finding:
    """The result of one check of the machine.

    Attributes:
        needed: nothing works unless the check passes. If False, models run all the same, but start cold.
    """

    check: str
    passed: bool
    message: str
    needed: bool = True


Json = dict[str, Any]

"""The facts that the controller decides on, all frozen.

Wall-clock times (``*_time``) are seconds since the epoch and may be stored. Monotonic times
(``since``, ``idle_since``) count from an arbitrary start, never jump, and are never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

DEFAULT_IDLE: Final = 300.0
DEFAULT_PARK: Final = 600.0
DEFAULT_TTL: Final = 86400.0


class StartMode(Enum):
    """How a deployment starts and sleeps."""

    COLD = "cold"
    WARM = "warm"
    CHECKPOINT = "checkpoint"


class Tier(Enum):
    """Where a start comes from, fastest first."""

    RESIDENT = "resident"
    PARKED = "parked"
    LOCAL = "local"
    REMOTE = "remote"
    COLD = "cold"


class Storage(Enum):
    """Where a deployment's snapshots are kept."""

    LOCAL = "local"
    # In the object store as well.
    S3 = "s3"


class Weights(Enum):
    """Where the weights of a deployment's instances are while they are captured."""

    DETACHED = "detached"
    # Snapshots carry them.
    INCLUDED = "included"


class DeploymentState(Enum):
    """Whether a deployment can answer; see the proto."""

    CREATING = auto()
    ACTIVE = auto()
    DEGRADED = auto()
    DELETING = auto()


class InstanceState(Enum):
    """The state of an instance as the controller sees it; ``lifecycle.py`` has the transitions."""

    UNKNOWN = auto()
    STARTING = auto()
    SERVING = auto()
    CAPTURING = auto()
    PARKING = auto()
    PARKED = auto()
    RESUMING = auto()
    # On its way to another GPU of its node; requests in flight go on when it has arrived.
    MOVING = auto()
    STOPPING = auto()
    FAILED = auto()
    GONE = auto()


class NodeState(Enum):
    """Whether commands can be sent to a node."""

    # Being asked what it holds; nothing is started on it in the meantime.
    CONNECTING = auto()
    READY = auto()
    UNREACHABLE = auto()


@dataclass(frozen=True, slots=True)
class Moment:
    """The same instant on both clocks, in seconds."""

    wall: float
    monotonic: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Checkpoint settings; ``ttl`` in seconds, None for the default."""

    enabled: bool
    ttl: float | None = None
    storage: Storage = Storage.LOCAL
    weights: Weights = Weights.DETACHED


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model, its start mode and its timers (seconds, None for the default)."""

    id: str
    uid: str
    model: str
    engine: str
    start_mode: StartMode
    checkpoint: Checkpoint
    idle_timeout: float | None
    park_timeout: float | None
    create_time: float
    update_time: float
    etag: str
    deleting: bool = False
    # Of the call that created the deployment; empty when the caller gave none.
    request_id: str = ""
    priority: int = 0
    # None for the default.
    min_instances: int | None = None
    max_instances: int | None = None
    # Of the model's weight files, as a node found them; 0: not known.
    weights_bytes: int = 0
    # Arguments of the engine. As the model, they never change.
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept_instances(self) -> int:
        """How many instances serve without requests."""
        return max(self.min_instances or 0, 1 if self.start_mode is StartMode.WARM else 0)

    @property
    def most_instances(self) -> int:
        """How many instances may serve at a time."""
        return max(1, self.kept_instances, self.max_instances or 0)

    @property
    def idle_seconds(self) -> float:
        """Seconds without a request after which an instance parks or stops."""
        if self.idle_timeout is not None:
            return self.idle_timeout
        return 0.0 if self.start_mode is StartMode.COLD else DEFAULT_IDLE

    @property
    def park_seconds(self) -> float:
        """Seconds that an instance stays parked before its process ends."""
        return DEFAULT_PARK if self.park_timeout is None else self.park_timeout

    @property
    def ttl_seconds(self) -> float:
        """Seconds after its last use for which a snapshot is kept."""
        return DEFAULT_TTL if self.checkpoint.ttl is None else self.checkpoint.ttl

    def runs(self, report: Report) -> bool:
        """Whether an instance is this deployment's.

        An earlier deployment of its id may have had another model, engine or options.
        """
        same_engine = report.engine == self.engine and report.engine_options == self.engine_options
        return (
            report.deployment == self.id
            and report.model in ("", self.model)
            and (not report.engine or same_engine)
        )


@dataclass(frozen=True, slots=True)
class Phase:
    """A named step and its duration in seconds."""

    name: str
    seconds: float


def total_seconds(phases: Iterable[Phase]) -> float:
    """The time of all phases; one named ``load.warm_up`` is part of ``load`` and counted there."""
    return sum(phase.seconds for phase in phases if "." not in phase.name)


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much an instance computes at once. ``kv_tokens`` is None where the engine has no KV cache.

    ``unbatched_reason``: why it computes answers one after the other after all; empty if it does not.
    """

    sequences: int
    kv_tokens: int | None = None
    unbatched_reason: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What an instance was computing when its node last asked it."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What a node reports of an instance. ``capacity`` is None until the node knows it."""

    id: str
    deployment: str
    state: InstanceState
    snapshot: str = ""
    pid: int = 0
    device: str = ""
    memory_bytes: int = 0
    create_time: float = 0.0
    phases: tuple[Phase, ...] = ()
    failure_reason: str = ""
    failure_message: str = ""
    weights: Weights = Weights.DETACHED
    capacity: Capacity | None = None
    load: Load = Load()
    model: str = ""
    # UUID of the GPU that it is on, or was on when it was parked; empty if it uses none.
    gpu: str = ""
    # GPU memory that it holds, or held when it was parked; and memory that its end makes free.
    gpu_bytes: int = 0
    ram_bytes: int = 0
    engine: str = ""
    engine_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Instance:
    """A report, and what only the controller knows of that instance.

    ``in_flight`` counts the sequences of requests that were sent to the instance and are not answered yet.
    ``busy`` is set while a command is under way, whose outcome then decides the state.
    ``served`` is set once a prompt may have entered it, after which it is never captured.
    ``draining`` is set once another instance has taken its place: it gets no new request, and is stopped
    when it has answered those that it has.
    """

    node: str
    state: InstanceState
    report: Report
    since: float
    idle_since: float
    in_flight: int = 0
    busy: bool = False
    served: bool = False
    park_refused: bool = False
    draining: bool = False

    @property
    def id(self) -> str:
        """The instance's id."""
        return self.report.id

    @property
    def deployment(self) -> str:
        """The id of the deployment that the instance names."""
        return self.report.deployment


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A file of a snapshot's image."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """The space of a snapshot in the object store; ``unique_bytes`` is what no other snapshot uses."""

    image_bytes: int
    data_bytes: int
    stored_bytes: int
    unique_bytes: int
    chunk_count: int
    encrypted: bool
    signer: str


@dataclass(frozen=True, slots=True)
class Captured:
    """The record of a snapshot that this controller captured or adopted; without one it is an orphan.

    ``manifest_digest`` is empty until the capture has ended. ``deployment_uid`` is empty once the snapshot
    is to be deleted wherever it turns up. ``adopt_time`` is 0 for a snapshot that was not adopted.
    """

    id: str
    deployment: str
    deployment_uid: str
    manifest_digest: str
    node: str = ""
    adopt_time: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as one node sees it.

    ``local``: the node holds it. ``published``: it is in the node's object store. ``incompatibility``
    says why that node cannot restore it, and is empty when it can.
    """

    id: str
    deployment: str
    node: str
    create_time: float
    quarantine_reason: str = ""
    quarantined: bool = False
    model: str = ""
    size_bytes: int = 0
    source_pause_seconds: float = 0.0
    compatibility: Mapping[str, str] = field(default_factory=dict)
    files: tuple[SnapshotFile, ...] = ()
    manifest_digest: str = ""
    weights: Weights = Weights.DETACHED
    local: bool = True
    published: bool = False
    incompatibility: str = ""
    engine: str = ""
    # The uid of the deployment that it was captured for or adopted into. None: it is an orphan, which is
    # neither restored nor deleted until a person asks for it.
    owner: str | None = None
    adopt_time: float = 0.0
    # Wall time since which no known node can restore it; None: one can.
    unusable_since: float | None = None
    stored: StoredSnapshot | None = None
    # The device that its source was on, and the GPU memory that it held there.
    device: str = ""
    gpu_bytes: int = 0
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def orphan(self) -> bool:
        """Whether this controller neither captured nor adopted the snapshot."""
        return self.owner is None

    @property
    def kind(self) -> frozenset[tuple[str, str]]:
        """What a node must be like to restore it. Weights are left out: they are not a fact of a node."""
        return frozenset(fact for fact in self.compatibility.items() if fact[0] != "weights")

    @property
    def age_key(self) -> tuple[float, str]:
        """Orders the snapshots of a deployment by age; adoption makes one new."""
        return max(self.create_time, self.adopt_time), self.id


@dataclass(frozen=True, slots=True)
class Verified:
    """How much of a snapshot was read and found intact."""

    local_bytes: int
    published_bytes: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was deleted from the object store, or would be; ``objects`` names the first of them."""

    objects: tuple[str, ...]
    object_count: int
    size_bytes: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check that a node made of itself."""

    check: str
    passed: bool
    message: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of a node, as it last said; ``other_bytes`` are held by something that is no instance."""

    uuid: str
    model: str
    total_bytes: int
    free_bytes: int = 0
    other_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    """A snapshotd and the machine it runs on; ``since`` is when its state began.

    ``draining`` is set by a person: nothing more is started there, and what runs there goes elsewhere.
    """

    id: str
    endpoint: str
    state: NodeState = NodeState.CONNECTING
    version: str = ""
    gpu_models: tuple[str, ...] = ()
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    cpu_count: int = 0
    checkpoint_capable: bool = False
    findings: tuple[Finding, ...] = ()
    # Where it publishes snapshots; empty: nowhere.
    object_store: str = ""
    # Bytes that its own snapshots may take; 0: no limit.
    snapshot_limit_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    # Bytes of memory that its instances may take together, and those of them that are parked; 0: no limit.
    instance_memory_limit_bytes: int = 0
    parked_memory_limit_bytes: int = 0
    # Bytes of memory that the weights of running models may take, and take; 0: it has no weight cache.
    weight_cache_limit_bytes: int = 0
    weight_cache_bytes: int = 0
    # Bytes that a fetched snapshot may take on its disk.
    disk_free_bytes: int = 0
    draining: bool = False
    heartbeat_time: float = 0.0
    heartbeat_at: float = 0.0
    since: float = 0.0
    # The versions of the engines that it has beside those that every node has, by name.
    engines: Mapping[str, str] = field(default_factory=dict)

    @property
    def takes_starts(self) -> bool:
        """Whether instances may be started or woken on it."""
        return self.state is NodeState.READY and not self.draining


@dataclass(frozen=True, slots=True)
class NodeModel:
    """A model that a node has; ``problem`` is why it cannot be served, empty if it can."""

    model: str
    node: str
    engine: str
    weights_bytes: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model as a node found it, the engine that serves it, and the bytes of its weights."""

    model: str
    engine: str
    weights_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Intent:
    """The record of an instance that is to be started or restored, kept until the instance is gone.

    ``snapshot`` is empty for a cold start. An instance without an intent was not started by this controller.
    """

    instance: str
    deployment: str
    node: str
    snapshot: str
    create_time: float


@dataclass(frozen=True, slots=True)
class StartInfo:
    """How a request got its instance; ``total_seconds`` count from its arrival to an instance that serves."""

    tier: Tier
    reasons: tuple[str, ...]
    phases: tuple[Phase, ...]
    total_seconds: float
    instance: str
    node: str

"""Frozen facts the controller decides on.

Wall-clock times (``*_time``) are seconds since the epoch and may be stored. Monotonic times
(``since``, ``idle_since``) count from an arbitrary start, never jump, and are never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

CAUSAL_LM: Final = "causal_lm"
EMBEDDING: Final = "embedding"
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
    CREATING = auto()
    ACTIVE = auto()
    DEGRADED = auto()
    DELETING = auto()


class InstanceState(Enum):
    """An instance as the controller sees it; ``lifecycle.py`` holds the transitions."""

    UNKNOWN = auto()
    STARTING = auto()
    SERVING = auto()
    CAPTURING = auto()
    PARKING = auto()
    PARKED = auto()
    RESUMING = auto()
    STOPPING = auto()
    FAILED = auto()
    GONE = auto()


class NodeState(Enum):
    # Known, and being asked what it holds; nothing new is started meanwhile.
    CONNECTING = auto()
    READY = auto()
    UNREACHABLE = auto()


@dataclass(frozen=True, slots=True)
class Moment:
    """One instant on both clocks, in seconds."""

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
    # Of the call that created it; empty when the caller gave none.
    request_id: str = ""

    @property
    def idle_seconds(self) -> float:
        if self.idle_timeout is not None:
            return self.idle_timeout
        return 0.0 if self.start_mode is StartMode.COLD else DEFAULT_IDLE

    @property
    def park_seconds(self) -> float:
        return DEFAULT_PARK if self.park_timeout is None else self.park_timeout

    @property
    def ttl_seconds(self) -> float:
        return DEFAULT_TTL if self.checkpoint.ttl is None else self.checkpoint.ttl

    def runs(self, report: Report) -> bool:
        """Whether an instance is this deployment's: one of that name may have had another model before."""
        return report.deployment == self.id and report.model in ("", self.model)


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
    """What an instance takes at once. ``kv_tokens`` is None where the engine has no KV cache."""

    sequences: int
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What an instance was at when its node asked it last."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What a node says of an instance. ``capacity`` is None while it has not told."""

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


@dataclass(frozen=True, slots=True)
class Instance:
    """A report, and what only the controller knows of that instance.

    ``in_flight`` counts the sequences of requests that were sent to it and are not answered yet.
    ``busy`` is set while a command of ours is under way: its outcome decides the state then.
    ``served`` is set once a prompt may have entered it, after which it is never captured.
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

    @property
    def id(self) -> str:
        return self.report.id

    @property
    def deployment(self) -> str:
        return self.report.deployment


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """What a snapshot takes in the object store; ``unique_bytes`` is what no other snapshot uses."""

    image_bytes: int
    data_bytes: int
    stored_bytes: int
    unique_bytes: int
    chunk_count: int
    encrypted: bool
    signer: str


@dataclass(frozen=True, slots=True)
class Captured:
    """A snapshot that this controller had made or adopted; what is not written down so is an orphan.

    ``manifest_digest`` is empty until the capture has ended. ``deployment_uid`` is empty once the snapshot
    is to be deleted wherever it still turns up. ``adopt_time`` is 0 for one that was not adopted.
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
    # The uid of the deployment that it was made for or adopted into. None: an orphan, which is neither
    # restored nor deleted until a person says so.
    owner: str | None = None
    adopt_time: float = 0.0
    # Wall time since when no known node could restore it; None: one can.
    unusable_since: float | None = None
    stored: StoredSnapshot | None = None

    @property
    def orphan(self) -> bool:
        """This controller did not have it made and was not told to adopt it."""
        return self.owner is None

    @property
    def kind(self) -> frozenset[tuple[str, str]]:
        """What a node must be like to restore it. Weights are compared too, but are no fact of a node."""
        return frozenset(fact for fact in self.compatibility.items() if fact[0] != "weights")

    @property
    def age_key(self) -> tuple[float, str]:
        """Orders snapshots of a deployment: the newest replaces the others, and adopting makes one new."""
        return max(self.create_time, self.adopt_time), self.id


@dataclass(frozen=True, slots=True)
class Verified:
    """Bytes of a snapshot that were read and found right."""

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
    check: str
    passed: bool
    message: str


@dataclass(frozen=True, slots=True)
class Node:
    """A snapshotd and the machine it runs on; ``since`` is when its state began."""

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
    heartbeat_time: float = 0.0
    heartbeat_at: float = 0.0
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    model: str
    engine: str


@dataclass(frozen=True, slots=True)
class Intent:
    """A start or restore that was decided, kept until its instance is gone; ``snapshot``: empty for a start.

    An instance without one was not started by this controller.
    """

    instance: str
    deployment: str
    node: str
    snapshot: str
    create_time: float


@dataclass(frozen=True, slots=True)
class StartInfo:
    """How a request got its instance; ``total_seconds`` from its arrival to an instance that serves."""

    tier: Tier
    reasons: tuple[str, ...]
    phases: tuple[Phase, ...]
    total_seconds: float
    instance: str
    node: str

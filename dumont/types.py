"""What the client returns: frozen facts, with durations in seconds and enums as lower-case words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Phase:
    """A named step of a start, and the seconds it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class StartInfo:
    """How the instance that answers was started.

    ``tier`` is ``resident``, ``parked``, ``local``, ``remote`` or ``cold``; ``reasons`` say why that one, and
    what was tried before it. ``seconds`` run from the request's arrival to an instance that serves.
    """

    tier: str
    reasons: tuple[str, ...]
    phases: tuple[Phase, ...]
    seconds: float
    instance: str
    node: str


@dataclass(frozen=True)
class StartProgress:
    """How far a start is: ``stage`` is what is being done, such as ``waiting``, ``load`` or ``capture``.

    ``instance`` and ``node`` are empty until they are known. ``snapshot`` is what is restored; it is
    empty where the model is loaded. Nothing is ``running`` once the start has ended.
    """

    running: bool
    stage: str
    instance: str
    node: str
    snapshot: str


@dataclass(frozen=True)
class Usage:
    """Tokens read and written.

    ``cached_prompt_tokens`` are those of ``prompt_tokens`` that another request had computed already.
    """

    prompt_tokens: int
    output_tokens: int
    cached_prompt_tokens: int = 0


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at a place of an answer; ``text`` is the token by itself."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token: the natural logarithm of its probability, before sampling.

    ``top`` has the likeliest tokens at its place, as many as were asked for, the likeliest first.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of answer ``index``, as it came. ``logprobs`` has one entry for each token, if asked for."""

    text: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One finished answer of several; ``finish_reason`` as in ``Generation``."""

    text: str
    finish_reason: str
    usage: Usage
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Generation:
    """A finished answer; ``str()`` of it, and so ``print``, gives the text.

    ``finish_reason`` is ``end``, ``length`` or ``stop``. ``first_token_seconds`` run from the call to the
    first token, as this client saw it, the start of a sleeping model included. ``answers`` are all that were
    asked for: ``text`` and ``finish_reason`` are those of the first, and ``usage`` counts the tokens of all.
    """

    text: str
    start: StartInfo
    usage: Usage
    finish_reason: str
    first_token_seconds: float
    answers: tuple[Answer, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class CheckpointSettings:
    """Whether snapshots are made, how many seconds each is kept after its last use, and where.

    ``ttl`` is None where the controller's default holds. ``weights`` is ``detached`` or, where snapshots
    carry them, ``included``.
    """

    enabled: bool
    ttl: float | None
    storage: str
    weights: str


@dataclass(frozen=True)
class DeploymentInfo:
    """A deployment as the controller last described it."""

    name: str
    uid: str
    model: str
    engine: str
    start_mode: str
    checkpoint: CheckpointSettings
    idle_timeout: float | None
    park_timeout: float | None
    state: str
    state_message: str
    create_time: datetime | None
    update_time: datetime | None
    last_use_time: datetime | None
    priority: int = 0
    min_instances: int = 0
    max_instances: int = 1
    engine_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StartCandidate:
    """A way in which a deployment could be started.

    ``start_seconds`` and ``room_seconds`` are estimates: of the start, and of making room for it. ``basis``
    says what they rest on, ``yields`` which instances would make the room, and ``why_not`` why it is not
    possible.
    """

    tier: str
    node: str
    gpu: str
    instance: str
    snapshot: str
    start_seconds: float
    room_seconds: float
    basis: str
    yields: tuple[str, ...]
    why_not: str


@dataclass(frozen=True)
class Explanation:
    """What a request to a deployment would do now, and the possible starts, the best one first."""

    decision: str
    candidates: tuple[StartCandidate, ...]


@dataclass(frozen=True)
class Capacity:
    """How much an instance computes at once: answers, and tokens in its KV cache (None: it has none).

    ``unbatched_reason``: why it computes answers one after the other after all; empty if it does not.
    """

    sequences: int
    kv_tokens: int | None
    unbatched_reason: str = ""


@dataclass(frozen=True)
class Load:
    """The load of an instance a moment ago: answers under way, requests waiting, tokens in its KV cache."""

    running: int
    waiting: int
    kv_tokens_used: int


@dataclass(frozen=True)
class Instance:
    """One model host. ``pid`` is its process on its node, 0 if there is none.

    ``orphan``: it names no deployment that the controller knows, and is kept until it is stopped.
    ``capacity`` is None while it has not told. ``in_flight`` are the answers that the controller waits for.
    ``gpu`` is the UUID of the GPU that it is or was on, empty if it uses none. ``draining``: another instance
    has taken its place, and it ends when it has answered what it was asked.
    """

    name: str
    deployment: str
    node: str
    state: str
    pid: int
    device: str
    memory_bytes: int
    snapshot: str
    create_time: datetime | None
    last_use_time: datetime | None
    phases: tuple[Phase, ...]
    failure_reason: str
    failure_message: str
    capacity: Capacity | None
    load: Load
    in_flight: int
    orphan: bool = False
    gpu_bytes: int = 0
    ram_bytes: int = 0
    reasons: tuple[str, ...] = ()
    gpu: str = ""
    draining: bool = False


@dataclass(frozen=True)
class SnapshotFile:
    """One file of a snapshot and its BLAKE3 digest in hex."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot in the object store.

    ``image_bytes`` are those of its files, ``data_bytes`` the same without zeros, ``stored_bytes`` what its
    chunks take, and ``unique_bytes`` what of that no other snapshot uses. ``signer`` is the key that signed
    its manifest.
    """

    image_bytes: int
    data_bytes: int
    stored_bytes: int
    unique_bytes: int
    chunk_count: int
    encrypted: bool
    signer: str


@dataclass(frozen=True)
class Snapshot:
    """A captured instance. ``compatibility``: the facts that must be equal on the machine that restores it.

    ``local``: a reachable node holds it. ``published``: it is in the object store, and ``stored`` is what it
    takes there, told only when a single snapshot is asked for. ``orphan``: it is no deployment's, and is kept
    until it is adopted or deleted.
    """

    name: str
    deployment: str
    node: str
    model: str
    state: str
    create_time: datetime | None
    last_use_time: datetime | None
    expire_time: datetime | None
    size_bytes: int
    source_pause_seconds: float
    compatibility: Mapping[str, str]
    files: tuple[SnapshotFile, ...]
    manifest_digest: str
    quarantine_reason: str
    local: bool
    published: bool
    stored: StoredSnapshot | None
    orphan: bool = False


@dataclass(frozen=True)
class Verified:
    """Bytes of a snapshot that were read and found intact, on its node and in the object store."""

    local_bytes: int
    published_bytes: int


@dataclass(frozen=True)
class Pruned:
    """What was deleted from the object store, or would be.

    ``objects`` names the first thousand of ``object_count``; ``kept_bytes`` is what is left of chunks.
    """

    objects: tuple[str, ...]
    object_count: int
    size_bytes: int
    kept_bytes: int
    dry_run: bool


@dataclass(frozen=True)
class SnapshotProgress:
    """The progress of a capture: the step under way, the instance, and the snapshots that were replaced."""

    stage: str
    instance: str
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeModel:
    """A model that a node has. ``problem`` is why it cannot be served, empty if it can."""

    model: str
    node: str
    engine: str
    weights_bytes: int
    problem: str


@dataclass(frozen=True)
class Finding:
    """The result of one check of a machine."""

    check: str
    passed: bool
    message: str


@dataclass(frozen=True)
class Remainder:
    """An instance that is still on a drained node; ``reason`` is a stable word, ``message`` a sentence."""

    instance: str
    deployment: str
    reason: str
    message: str


@dataclass(frozen=True)
class NodeGpu:
    """A GPU of a node, in bytes. ``memory_other_bytes`` are held by something that is no instance."""

    uuid: str
    model: str
    memory_total_bytes: int
    memory_free_bytes: int
    memory_other_bytes: int


@dataclass(frozen=True)
class Node:
    """A snapshotd and the machine it runs on. ``object_store``: where it publishes snapshots, or empty.

    ``engines``: the versions of the engines that it has beside those that every node has.

    Its own snapshots take ``snapshot_bytes`` and may take ``snapshot_limit_bytes``, 0 for no limit.
    ``draining``: nothing more is started there, and what runs there goes elsewhere.
    Its instances take ``instance_memory_bytes``, the parked ones of these ``parked_memory_bytes``, each with
    a limit; 0 for none.
    """

    name: str
    endpoint: str
    state: str
    version: str
    gpu_models: tuple[str, ...]
    memory_total_bytes: int
    memory_available_bytes: int
    cpu_count: int
    checkpoint_capable: bool
    heartbeat_time: datetime | None
    findings: tuple[Finding, ...]
    object_store: str
    snapshot_bytes: int = 0
    snapshot_limit_bytes: int = 0
    draining: bool = False
    engines: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[NodeGpu, ...] = ()
    instance_memory_bytes: int = 0
    instance_memory_limit_bytes: int = 0
    parked_memory_bytes: int = 0
    parked_memory_limit_bytes: int = 0

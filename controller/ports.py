"""What the controller needs from the world.

The life of an instance, seen from here: the controller chooses an id, writes an *intent* with it
to the registry, and only then asks a node to start or restore under that id. The node answers
once the instance serves, or says why not. Between those two moments the controller may die: the
next one reads the intent, asks the node what it holds, and finds the instance starting, serving
or absent; it never sends a second start. A parked instance is resumed; a serving one is parked,
captured or stopped; a stopped one leaves nothing on its node, and its intent is dropped. An instance
without an intent and a snapshot without a record of its capture belong to somebody else and are left alone.

Example: deployment ``qa`` has no instance and one snapshot. ``save_intent(qa-1)``,
``restore(node, qa-1, ...)``, a report SERVING; five idle minutes later ``park(node, qa-1)``, ten more
and ``stop(node, qa-1)``, ``drop_intents(qa-1)``. The snapshot stays until its ttl.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from controller.identity import Decide, Established
from controller.model import (
    Captured,
    Deployment,
    Intent,
    Moment,
    Node,
    NodeModel,
    Pruned,
    Report,
    ResolvedModel,
    Snapshot,
    Verified,
    Weights,
)

# The reason of an Unavailable when a node did not answer at all.
NODE_UNAVAILABLE: Final = "NODE_UNAVAILABLE"


class Clock(Protocol):
    """Time. Wall time may jump and is stored; monotonic time never jumps and is not."""

    def moment(self) -> Moment:
        """The time now."""

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds of monotonic time."""


@dataclass(frozen=True, slots=True)
class Removed:
    """An instance is gone from its node."""

    instance: str


@dataclass(frozen=True, slots=True)
class Synchronized:
    """Every instance that existed when the watch began has been reported."""


Change = Report | Removed | Synchronized


@dataclass(frozen=True, slots=True)
class ListedSnapshots:
    """The snapshots within a node's reach.

    ``store_silence`` says why published ones may be missing or out of date; empty: they are not.
    """

    snapshots: tuple[Snapshot, ...]
    store_silence: str = ""


class Frames(Protocol):
    """An answer as the model host wrote it, frame by frame.

    Not a generator: every generator on the way costs time for every token.
    """

    async def read(self) -> bytes | None:
        """The next frame; None after the last. Raises: Cancelled, after ``cancel``."""

    def cancel(self) -> None:
        """End the call on the node if it still runs. A read under way, and any later one, is Cancelled."""


class Nodes(Protocol):
    """The nodes' snapshotds. Every method takes a node's id and raises a ``DumontError``.

    ``Unavailable`` with reason NODE_UNAVAILABLE means that the node did not answer at all, so that
    nothing is known about the call. A cancelled start, restore or capture is cancelled on the node.
    """

    async def connect(self, node: str, endpoint: str) -> None:
        """Remember where the node is; a later call replaces the endpoint."""

    async def disconnect(self, node: str) -> None:
        """Drop the connection; calls under way fail."""

    async def list_models(self, node: str) -> tuple[NodeModel, ...]:
        """The models that the node has."""

    async def resolve_model(self, node: str, model: str, engine: str) -> ResolvedModel:
        """Find a model on the node, and the engine for it if ``engine`` is empty."""

    def watch(self, node: str) -> AsyncGenerator[Change]:
        """Every instance, then ``Synchronized``, then each change. Ends only with an error."""

    async def get_instance(self, node: str, instance: str) -> Report:
        """An instance as it is now. Raises: NotFound."""

    async def list_snapshots(self, node: str) -> ListedSnapshots:
        """The snapshots that the node holds or finds in its object store."""

    async def start(
        self,
        node: str,
        instance: str,
        deployment: str,
        model: str,
        engine: str,
        weights: Weights,
        engine_options: Mapping[str, Any],
        gpu: str = "",
    ) -> Report:
        """Load a model in a new instance and wait until it serves. A repeated call joins the first.

        ``gpu`` is the UUID of one of the node's; empty: the node chooses.
        """

    async def restore(
        self,
        node: str,
        instance: str,
        deployment: str,
        snapshot: str,
        manifest_digest: str,
        gpu: str = "",
    ) -> Report:
        """Make an instance from a snapshot and wait until it serves.

        Args:
            node: the node's id.
            instance: the new instance's id.
            deployment: the deployment that the instance is for.
            snapshot: the snapshot's id.
            manifest_digest: the digest that the manifest must have; empty: it is not checked.
            gpu: the UUID of one of the node's; empty: the node chooses.
        """

    async def stage(self, node: str, instance: str) -> str:
        """The step of the instance's start, restore or capture that is waited for; empty if none is."""

    async def capture(self, node: str, instance: str, snapshot: str) -> Snapshot:
        """Make a snapshot of the given id; the instance serves again when this returns."""

    async def park(self, node: str, instance: str) -> Report:
        """Freeze an instance; its process stays."""

    async def resume(self, node: str, instance: str, gpu: str = "") -> Report:
        """Let a parked instance go on; on the GPU of that UUID, or on one that the node chooses."""

    async def move(self, node: str, instance: str, gpu: str) -> Report:
        """Bring a serving instance to another GPU of its node.

        Args:
            node: the node's id.
            instance: its id.
            gpu: the GPU's UUID, or its index on the node.
        """

    async def stop(self, node: str, instance: str) -> None:
        """End an instance and remove what it has on the node. Raises: NotFound."""

    async def get_snapshot(self, node: str, snapshot: str) -> Snapshot:
        """A snapshot as it is now, with its size in the object store. Raises: NotFound."""

    async def delete_snapshot(self, node: str, snapshot: str) -> None:
        """Delete a snapshot on the node and in its object store. Raises: NotFound."""

    async def undelete_snapshot(self, node: str, snapshot: str) -> Snapshot:
        """Publish a deleted snapshot again, while the node's object store still has what it needs."""

    async def publish(self, node: str, snapshot: str) -> Snapshot:
        """Upload a snapshot of the node and wait until it is published. Repeating it joins the first."""

    async def prefetch(self, node: str, snapshot: str, manifest_digest: str) -> Snapshot:
        """Fetch a published snapshot to the node and wait until it is there; see ``restore``."""

    async def verify(self, node: str, snapshot: str) -> Verified:
        """Read all of a snapshot. Raises: DataLoss, it is damaged and now quarantined."""

    async def prune(self, node: str, dry_run: bool) -> Pruned:
        """Delete from the node's object store what no published snapshot needs."""

    def stream_logs(self, node: str, instance: str, tail_lines: int, follow: bool) -> AsyncGenerator[bytes]:
        """What an instance's model host has printed; with ``follow``, what it prints from now on as well."""

    def generate(self, node: str, request: bytes, timeout: float | None) -> Frames:
        """Send a request for text. The caller must cancel the frames in the end, however far it has read."""

    async def embed(self, node: str, request: bytes, timeout: float | None) -> bytes:
        """Send a request for embeddings; returns the encoded response."""

    async def close(self) -> None:
        """Drop every connection."""


@dataclass(frozen=True, slots=True)
class Members:
    """The controllers that share the registry.

    Args:
        addresses: where each listens, by the number of its session.
        highest: the number of the newest session that there was.
        revision: changes whenever deployments, their holders, nodes or records of captures do.
    """

    addresses: Mapping[int, str] = field(default_factory=dict)
    highest: int = 0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """Everything the registry holds but operations.

    ``last_use`` maps deployment ids to wall times, and ``holders`` to the session that acts on each.
    """

    deployments: tuple[Deployment, ...] = ()
    nodes: tuple[Node, ...] = ()
    intents: tuple[Intent, ...] = ()
    captured: tuple[Captured, ...] = ()
    last_use: Mapping[str, float] | None = None
    holders: Mapping[str, int] = field(default_factory=dict)
    members: Members = field(default_factory=Members)


@dataclass(frozen=True, slots=True)
class StoredOperation:
    """A long-running operation: the session that runs it, and its encoded message."""

    session: int
    done: bool
    content: bytes


class Registry(Protocol):
    """What survives the controller. A call that returned has been stored.

    Every method raises ``Unavailable`` (DATABASE_UNAVAILABLE) when the store cannot be reached.
    """

    # Sessions: which controllers share the store

    async def join(self, decide: Decide, address: str, seconds: float) -> Established:
        """Begin this controller's session. Where only one controller can be, all others end.

        Args:
            decide: says which fleet this is, from what is stored; what it raises is passed on.
            address: where the other controllers reach this one.
            seconds: without a renewal, the session may be ended after so long.

        Returns:
            What was decided and is stored now.
        """

    async def renew(self, seconds: float) -> None:
        """Keep this controller's session for so many seconds from now on.

        Raises:
            Aborted: SESSION_ENDED, as from now on every call of this controller that stores something.
        """

    async def end_expired(self) -> None:
        """End the sessions of other controllers whose time is up."""

    async def leave(self) -> None:
        """End this controller's session."""

    async def claim(self) -> frozenset[str]:
        """Become the holder of the deployments whose holder's session has ended; returns their ids."""

    async def members(self) -> Members:
        """The sessions that live, without what is loaded otherwise."""

    # Facts

    async def load(self) -> Stored:
        """Everything that is stored."""

    async def create_deployment(self, deployment: Deployment) -> Deployment:
        """Store it, or return the one stored before with the same non-empty ``request_id``.

        Raises:
            AlreadyExists: the id is taken by another request.
        """

    async def update_deployment(self, deployment: Deployment, etag: str) -> None:
        """Replace the deployment whose stored etag is ``etag``.

        Raises:
            Aborted: ETAG_MISMATCH, it was changed meanwhile or is gone.
        """

    async def delete_deployment(self, deployment: str) -> None:
        """Remove a deployment and its last use; does nothing if it is absent."""

    async def save_last_use(self, times: Mapping[str, float]) -> None:
        """Store wall times by deployment id; ids without a deployment are ignored."""

    async def save_node(self, node: Node) -> None:
        """Store a node, replacing an earlier one of its id."""

    async def save_intent(self, intent: Intent) -> None:
        """Store an intent."""

    async def drop_intents(self, instances: Iterable[str]) -> None:
        """Remove the intents of these instances; absent ones are ignored."""

    async def save_captured(self, captured: Captured) -> None:
        """Store the record of a capture, replacing an earlier one of its id."""

    async def drop_captured(self, snapshot: str) -> None:
        """Remove the record of a capture; does nothing if it is absent."""

    async def save_operation(self, name: str, content: bytes, done: bool) -> None:
        """Store a long-running operation of this session; of those that are done, the newest are kept."""

    async def operation(self, name: str) -> StoredOperation | None:
        """A stored operation, whoever runs it; None: there is none of this name."""

    async def drop_operation(self, name: str) -> None:
        """Remove an operation; does nothing if it is absent."""

    async def close(self) -> None:
        """Disconnect."""

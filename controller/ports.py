"""What the controller needs from the world.

The life of an instance, seen from here: the controller chooses an id, writes an *intent* with it
to the registry, and only then asks a node to start or restore under that id. The node answers
once the instance serves, or says why not. Between those two moments the controller may die: the
next one reads the intent, asks the node what it holds, and finds the instance starting, serving
or absent; it never sends a second start. A parked instance is resumed, a serving one parked,
captured or stopped; a stopped one leaves nothing on its node, and its intent is dropped. What a node
holds without an intent, or without a record that it was captured, is a stranger's and is left alone.

Example: deployment ``qa`` has no instance and one snapshot. ``save_intent(qa-1)``,
``restore(node, qa-1, ...)``, a report SERVING; five idle minutes later ``park(node, qa-1)``, ten more
and ``stop(node, qa-1)``, ``drop_intents(qa-1)``. The snapshot stays until its ttl.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from controller.identity import Identity
from controller.model import (
    Captured,
    Deployment,
    Intent,
    Moment,
    Node,
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

    def moment(self) -> Moment: ...

    async def sleep(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Removed:
    """An instance is gone from its node."""

    instance: str


@dataclass(frozen=True, slots=True)
class Synchronized:
    """Every instance that existed when the watch began has been told."""


Change = Report | Removed | Synchronized


class Frames(Protocol):
    """An answer as the model host wrote it, frame by frame.

    It is no generator, because each of those on a token's way costs time for every token.
    """

    async def read(self) -> bytes | None:
        """The next frame; None after the last."""

    def cancel(self) -> None:
        """End the call on the node, if it still runs."""


class Nodes(Protocol):
    """The nodes' snapshotds. Every method takes a node's id and raises a ``DumontError``.

    ``Unavailable`` with reason NODE_UNAVAILABLE means that the node did not answer at all, so that
    nothing is known about the call. A cancelled start, restore or capture is cancelled on the node.
    """

    async def connect(self, node: str, endpoint: str) -> None:
        """Remember where the node is; a later call replaces it."""

    async def disconnect(self, node: str) -> None:
        """Drop the connection; calls under way fail."""

    async def resolve_model(self, node: str, model: str, engine: str) -> ResolvedModel: ...

    def watch(self, node: str) -> AsyncGenerator[Change]:
        """Every instance, then ``Synchronized``, then each change. Ends only by an error."""

    async def get_instance(self, node: str, instance: str) -> Report: ...

    async def list_snapshots(self, node: str) -> list[Snapshot]: ...

    async def start(
        self, node: str, instance: str, deployment: str, model: str, engine: str, weights: Weights
    ) -> Report:
        """Load a model in a new instance and wait until it serves. Repeating it joins the first."""

    async def restore(
        self, node: str, instance: str, deployment: str, snapshot: str, manifest_digest: str
    ) -> Report:
        """Make an instance from a snapshot and wait until it serves.

        Args:
            manifest_digest: what the snapshot's manifest must hash to; empty: not checked.
        """

    async def capture(self, node: str, instance: str, snapshot: str) -> Snapshot:
        """Make a snapshot under the given id; the instance serves again when this returns."""

    async def park(self, node: str, instance: str) -> Report: ...

    async def resume(self, node: str, instance: str) -> Report: ...

    async def stop(self, node: str, instance: str) -> None: ...

    async def get_snapshot(self, node: str, snapshot: str) -> Snapshot: ...

    async def delete_snapshot(self, node: str, snapshot: str) -> None:
        """On this node and in its object store."""

    async def undelete_snapshot(self, node: str, snapshot: str) -> Snapshot:
        """Publish a deleted snapshot again, while the node's object store still has what it needs."""

    async def publish(self, node: str, snapshot: str) -> Snapshot:
        """Upload a snapshot of the node and wait until it is published. Repeating it joins the first."""

    async def prefetch(self, node: str, snapshot: str, manifest_digest: str) -> Snapshot:
        """Bring a published snapshot to the node and wait until it is there; see ``restore``."""

    async def verify(self, node: str, snapshot: str) -> Verified:
        """Read all of it. Raises: DataLoss, it is damaged and now quarantined."""

    async def prune(self, node: str, dry_run: bool) -> Pruned:
        """Delete from the node's object store what no published snapshot needs."""

    def stream_logs(
        self, node: str, instance: str, tail_lines: int, follow: bool
    ) -> AsyncGenerator[bytes]: ...

    def generate(self, node: str, request: bytes, timeout: float | None) -> Frames:
        """Send a request; its frames are read one by one, and must be cancelled in the end."""

    async def embed(self, node: str, request: bytes, timeout: float | None) -> bytes: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """Everything the registry holds; ``last_use`` maps deployment ids to wall times."""

    deployments: tuple[Deployment, ...] = ()
    nodes: tuple[Node, ...] = ()
    intents: tuple[Intent, ...] = ()
    captured: tuple[Captured, ...] = ()
    last_use: Mapping[str, float] | None = None


class Registry(Protocol):
    """What survives the controller. A call that returned has been stored.

    Every method raises ``Unavailable`` (DATABASE_UNAVAILABLE) when the store cannot be reached.
    """

    async def identity(self) -> Identity | None:
        """Whose database it is; None: nobody's yet."""

    async def save_identity(self, identity: Identity) -> None:
        """It is this controller's from now on."""

    async def load(self) -> Stored: ...

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
        """Remove it with its last use; absent is fine."""

    async def save_last_use(self, times: Mapping[str, float]) -> None:
        """Store wall times by deployment id; ids without a deployment are ignored."""

    async def save_node(self, node: Node) -> None: ...

    async def save_intent(self, intent: Intent) -> None: ...

    async def drop_intents(self, instances: Iterable[str]) -> None:
        """Absent is fine."""

    async def save_captured(self, captured: Captured) -> None:
        """Store it, in place of an earlier one with its id."""

    async def drop_captured(self, snapshot: str) -> None:
        """Absent is fine."""

    async def close(self) -> None: ...

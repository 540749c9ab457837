"""Commands to snapshots: each chooses a node that can carry it out."""

from __future__ import annotations

from dataclasses import replace

import structlog

from controller import policy
from controller.core import Core
from controller.model import Captured, NodeState, Pruned, Snapshot, StoredSnapshot, Verified
from dumont.errors import DumontError, FailedPrecondition, NotFound

log = structlog.get_logger()


class Snapshots:
    """Snapshots of all nodes and of the object store."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._inventory = core.inventory

    async def delete(self, snapshot: str) -> None:
        """Delete a snapshot on every ready node and in the object store.

        One that is gone already counts as deleted.

        Raises:
            NotFound: the controller knows no such snapshot.
            Unavailable: none of the nodes that know it can be reached.
            DumontError: what a node says.
        """
        self._inventory.snapshot(snapshot)
        copies = self._inventory.copies(snapshot)
        ready = [copy for copy in copies if self._ready(copy.node)]
        if not ready:
            self._core.fleet.check_reachable(copies[0].node)
        # Any node deletes it from the object store, and each that holds it from itself.
        asked = [copy.node for copy in ready if copy.local] or [ready[0].node]
        for node in asked:
            try:
                await self._core.nodes.delete_snapshot(node, snapshot)
            except NotFound:
                log.info("snapshot_already_gone", snapshot=snapshot, node=node)
        left = [copy for copy in copies if copy.local and copy.node not in asked]
        for copy in copies:
            self._inventory.drop_snapshot(snapshot, copy.node)
        for copy in left:
            # On a node that does not answer now; it is deleted when that does.
            self._inventory.put_snapshot(replace(copy, published=False))
        if not left:
            await self._core.registry.drop_captured(snapshot)
            self._inventory.captured.pop(snapshot, None)

    async def publish(self, snapshot: str) -> None:
        """Have the node that holds a snapshot upload it, and wait until it is published.

        Raises:
            NotFound: the controller knows no such snapshot.
            DumontError: what the node says.
        """
        known = self._inventory.snapshot(snapshot)
        self._core.fleet.check_reachable(known.node)
        captured = Captured(known.id, known.deployment, known.manifest_digest)
        # Once more, in case the first time failed: without this record no node may restore it.
        await self._core.registry.save_captured(captured)
        self._inventory.put_captured(captured)
        self._inventory.put_snapshot(await self._core.nodes.publish(known.node, snapshot))
        for node in self._inventory.nodes.values():
            if node.object_store and node.id != known.node and self._ready(node.id):
                await self._core.fleet.refresh_snapshots(node.id)

    def prefetch_node(self, snapshot: str, wanted: str = "") -> str:
        """The node to bring a published snapshot to.

        Args:
            snapshot: its id.
            wanted: a node's id; empty: one that holds the snapshot or, when none does, the one that a
                start would choose.

        Raises:
            NotFound: the controller knows no such snapshot, or no such node.
            FailedPrecondition: SNAPSHOT_OUT_OF_REACH, no ready node may restore it from the store.
        """
        self._inventory.snapshot(snapshot)
        if wanted:
            self._core.fleet.check_reachable(wanted)
        copies = [c for c in self._inventory.copies(snapshot) if wanted in ("", c.node)]
        usable = [c for c in copies if policy.usable(c, self._inventory.nodes)]
        if not usable:
            raise FailedPrecondition(
                "SNAPSHOT_OUT_OF_REACH",
                f"snapshots/{snapshot} cannot be brought to {f'nodes/{wanted}' if wanted else 'a node'}: it "
                "must be published by this controller, not quarantined, and compatible with the node",
                metadata={"snapshot": f"snapshots/{snapshot}"},
            )
        held = {c.node: self._inventory.nodes[c.node] for c in usable if c.local}
        return policy.place(held or {c.node: self._inventory.nodes[c.node] for c in usable}).id

    async def prefetch(self, snapshot: str, node: str) -> Snapshot:
        """Have a node fetch a published snapshot; does nothing when the node holds it.

        Raises:
            DataLoss: the snapshot is damaged, and quarantined there.
            DumontError: what the node says.
        """
        captured = self._inventory.captured.get(snapshot)
        try:
            found = await self._core.nodes.prefetch(
                node, snapshot, captured.manifest_digest if captured else ""
            )
        except DumontError:
            await self._core.fleet.refresh_snapshots(node)
            raise
        self._inventory.put_snapshot(found)
        return self._inventory.snapshot(snapshot)

    async def stored(self, snapshot: Snapshot) -> StoredSnapshot | None:
        """The space a published snapshot takes in the object store; None when no node can tell."""
        try:
            return (await self._core.nodes.get_snapshot(snapshot.node, snapshot.id)).stored
        except DumontError as error:
            log.info("stored_size_unknown", snapshot=snapshot.id, node=snapshot.node, reason=error.reason)
            return None

    async def verify(self, snapshot: str) -> Verified:
        """Read all of a snapshot, on its node and in the object store.

        Raises:
            NotFound: the controller knows no such snapshot.
            DataLoss: it is damaged, and quarantined.
        """
        known = self._inventory.snapshot(snapshot)
        self._core.fleet.check_reachable(known.node)
        try:
            return await self._core.nodes.verify(known.node, snapshot)
        except DumontError:
            await self._core.fleet.refresh_snapshots(known.node)
            raise

    def store_node(self) -> str:
        """The id of a ready node with an object store.

        Raises:
            FailedPrecondition: OBJECT_STORE_NOT_CONFIGURED, there is none.
        """
        for node in self._inventory.nodes.values():
            if node.object_store and self._ready(node.id):
                return node.id
        raise FailedPrecondition(
            "OBJECT_STORE_NOT_CONFIGURED",
            "no ready node has an object store; start a snapshotd with --store-url",
        )

    async def prune(self, node: str, dry_run: bool) -> Pruned:
        """Delete from a node's object store what no published snapshot needs."""
        return await self._core.nodes.prune(node, dry_run)

    def _ready(self, node: str) -> bool:
        return self._inventory.nodes[node].state is NodeState.READY

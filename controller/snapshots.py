"""Commands to snapshots: each chooses a node that can carry it out."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from controller import policy
from controller.core import Core
from controller.deployments import Draft
from controller.model import (
    Captured,
    Deployment,
    NodeState,
    Pruned,
    Snapshot,
    StartMode,
    Storage,
    StoredSnapshot,
    Verified,
)
from dumont import names
from dumont.errors import AlreadyExists, DumontError, FailedPrecondition, NotFound

log = structlog.get_logger()


class Snapshots:
    """Snapshots of all nodes and of the object store."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._inventory = core.inventory

    async def delete(self, snapshot: str) -> None:
        """Delete a snapshot on every ready node and in the object store.

        One that is already gone counts as deleted.

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
        if left:
            # Some nodes do not answer now. A record without a deployment gets their copies deleted when
            # they do.
            abandoned = Captured(snapshot, left[0].deployment, "", left[0].manifest_digest, left[0].node)
            await self._core.registry.save_captured(abandoned)
            self._inventory.put_captured(abandoned)
            for copy in left:
                self._inventory.put_snapshot(replace(copy, published=False))
        else:
            await self._core.registry.drop_captured(snapshot)
            self._inventory.drop_captured(snapshot)

    def replaced_by(self, snapshot: Snapshot) -> list[str]:
        """The ids of the deployment's snapshots that are deleted because of a newer one; see ``expiry``."""
        known = self._inventory.snapshots_of(snapshot.deployment)
        return sorted(
            one.id
            for one in known
            if one.id != snapshot.id
            and one.owner == snapshot.owner
            and one.kind == snapshot.kind
            and not one.quarantined
        )

    async def adopt(self, snapshot: str, deployment: str = "") -> Snapshot:
        """Make an orphan a deployment's newest snapshot.

        Args:
            snapshot: its id.
            deployment: the deployment's id; empty: the one that the snapshot names. A deployment that does
                not exist is created from what the snapshot records.

        Raises:
            NotFound: the controller knows no such snapshot.
            FailedPrecondition: SNAPSHOT_NOT_ORPHAN, SNAPSHOT_QUARANTINED, or MODEL_DIFFERS.
            DumontError: the deployment could not be created, or the record could not be stored.
        """
        known = self._inventory.snapshot(snapshot)
        name = f"snapshots/{snapshot}"
        if not known.orphan:
            raise FailedPrecondition(
                "SNAPSHOT_NOT_ORPHAN",
                f"{name} belongs to deployments/{known.deployment} already",
                metadata={"snapshot": name, "deployment": f"deployments/{known.deployment}"},
            )
        if known.quarantined:
            raise FailedPrecondition(
                "SNAPSHOT_QUARANTINED",
                f"{name} is quarantined and cannot be adopted: {known.quarantine_reason}",
                metadata={"snapshot": name},
            )
        owner = await self._adopter(known, deployment or known.deployment)
        record = Captured(
            snapshot,
            owner.id,
            owner.uid,
            known.manifest_digest,
            known.node if known.local else "",
            self._core.clock.moment().wall,
        )
        await self._core.registry.save_captured(record)
        self._inventory.put_captured(record)
        log.info("snapshot_adopted", snapshot=snapshot, deployment=owner.id)
        return self._inventory.snapshot(snapshot)

    async def _adopter(self, snapshot: Snapshot, deployment: str) -> Deployment:
        if deployment not in self._core.deployments.by_id:
            draft = Draft(
                model=snapshot.model,
                engine=snapshot.engine,
                start_mode=StartMode.CHECKPOINT,
                checkpoint_storage=Storage.S3 if snapshot.published else Storage.LOCAL,
                checkpoint_weights=snapshot.weights,
                engine_options=snapshot.engine_options,
            )
            return await self._core.deployments.create(names.check_id(deployment, "deployment"), draft, "")
        owner = self._core.deployments.get_active(deployment)
        if owner.model != snapshot.model:
            raise FailedPrecondition(
                "MODEL_DIFFERS",
                f"snapshots/{snapshot.id} is of the model {snapshot.model} and deployments/{deployment} has "
                f"{owner.model}; name another deployment",
                field="deployment",
                metadata={"snapshot": snapshot.model, "deployment": owner.model},
            )
        if owner.engine_options != snapshot.engine_options:
            raise FailedPrecondition(
                "ENGINE_OPTIONS_DIFFER",
                f"snapshots/{snapshot.id} was captured with the engine options "
                f"{dict(snapshot.engine_options)} and deployments/{deployment} has "
                f"{dict(owner.engine_options)}; name another deployment",
                field="deployment",
            )
        return owner

    async def undelete(self, snapshot: str) -> Snapshot:
        """Publish a deleted snapshot again, as an orphan, so that it is not deleted at once.

        Raises:
            AlreadyExists: SNAPSHOT_EXISTS, the snapshot is not deleted.
            NotFound: the object store has nothing left of it.
            FailedPrecondition: OBJECT_STORE_NOT_CONFIGURED.
        """
        known = self._inventory.snapshots.get(snapshot)
        if known is not None and known.owner != "":
            raise AlreadyExists(
                "SNAPSHOT_EXISTS",
                f"snapshots/{snapshot} is not deleted",
                metadata={"snapshot": f"snapshots/{snapshot}"},
            )
        node = self.store_node()
        # Its deletion may have left a record that would have it deleted again wherever it turns up.
        await self._core.registry.drop_captured(snapshot)
        self._inventory.drop_captured(snapshot)
        self._inventory.put_snapshot(await self._core.nodes.undelete_snapshot(node, snapshot))
        await self._refresh_other_stores(node)
        return self._inventory.snapshot(snapshot)

    async def publish(self, snapshot: str) -> None:
        """Have the node that holds a snapshot upload it, and wait until it is published.

        Raises:
            NotFound: the controller knows no such snapshot.
            DumontError: what the node says.
        """
        known = self._inventory.snapshot(snapshot)
        self._core.fleet.check_reachable(known.node)
        captured = self._inventory.captured[snapshot]
        # Once more, in case the first time failed: without this record no node may restore it.
        await self._core.registry.save_captured(captured)
        self._inventory.put_snapshot(await self._core.nodes.publish(known.node, snapshot))
        await self._refresh_other_stores(known.node)

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

    async def _refresh_other_stores(self, changed: str) -> None:
        """Ask the other nodes with the store of a node, which has changed it, what is published there."""
        store = self._inventory.nodes[changed].object_store
        others = [
            node.id
            for node in self._inventory.nodes.values()
            if node.object_store == store and node.id != changed and self._ready(node.id)
        ]
        refresh = self._core.fleet.refresh_snapshots
        answers = await asyncio.gather(*map(refresh, others), return_exceptions=True)
        for node, answer in zip(others, answers, strict=True):
            if isinstance(answer, DumontError):
                # It is asked again when it answers. What was published is published all the same.
                log.warning("refresh_snapshots_failed", node=node, reason=answer.reason)
            elif answer is not None:
                raise answer

    def _ready(self, node: str) -> bool:
        return self._inventory.nodes[node].state is NodeState.READY

"""Commands to instances and snapshots: begin, call the node, finish; after a refusal ask what is true."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog

from controller import policy
from controller.fleet import Fleet
from controller.inventory import Inventory
from controller.machine import SAW, Event
from controller.model import Captured, Instance, NodeState, Pruned, Report, Snapshot, StoredSnapshot, Verified
from controller.ports import Nodes, Registry
from controller.tasks import Tasks
from dumont.errors import DumontError, FailedPrecondition, NotFound, Unavailable

log = structlog.get_logger()

NODE_UNAVAILABLE = "NODE_UNAVAILABLE"


class Commands:
    """Each command runs to its end once it was sent, even when its caller leaves."""

    def __init__(
        self, nodes: Nodes, registry: Registry, inventory: Inventory, fleet: Fleet, tasks: Tasks
    ) -> None:
        self._nodes = nodes
        self._registry = registry
        self._inventory = inventory
        self._fleet = fleet
        self._tasks = tasks

    async def park(self, instance: str) -> Instance:
        """Freeze it.

        Raises:
            NotFound: there is no such instance.
            FailedPrecondition: ILLEGAL_TRANSITION, INSTANCE_BUSY, or what the node says.
            Unavailable: its node cannot be reached.
        """
        await self._command(instance, Event.PARK, self._nodes.park)
        return self._inventory.instance(instance)

    async def resume(self, instance: str) -> Instance:
        """Thaw it. Raises like ``park``."""
        await self._command(instance, Event.RESUME, self._nodes.resume)
        return self._inventory.instance(instance)

    async def stop(self, instance: str, force: bool = False) -> None:
        """End it, with ``force`` even while it answers requests; gone already counts as ended.

        Raises like ``park``.
        """
        await self._command(instance, Event.STOP, self._stop, force)

    async def delete_snapshot(self, snapshot: str) -> None:
        """Delete it on every ready node and in the object store; gone already counts as deleted.

        Raises:
            NotFound: the controller knows no such snapshot.
            Unavailable: no node that reaches it can be reached.
            DumontError: what a node says.
        """
        self._inventory.snapshot(snapshot)
        copies = self._inventory.copies(snapshot)
        ready = [copy for copy in copies if self._ready(copy.node)]
        if not ready:
            self.check_reachable(copies[0].node)
        # Any node deletes it from the object store, and each that holds it from itself.
        told = [copy.node for copy in ready if copy.local] or [ready[0].node]
        for node in told:
            try:
                await self._nodes.delete_snapshot(node, snapshot)
            except NotFound:
                log.info("snapshot_was_gone", snapshot=snapshot, node=node)
        left = [copy for copy in copies if copy.local and copy.node not in told]
        for copy in copies:
            self._inventory.drop_snapshot(snapshot, copy.node)
        for copy in left:
            # On a node that does not answer now; it is deleted when that does.
            self._inventory.put_snapshot(replace(copy, published=False))
        if not left:
            await self._registry.drop_captured(snapshot)
            self._inventory.captured.pop(snapshot, None)

    async def publish(self, snapshot: str) -> None:
        """Have the node that holds it upload it, and wait until it is published.

        Raises:
            NotFound: the controller knows no such snapshot.
            DumontError: what the node says.
        """
        known = self._inventory.snapshot(snapshot)
        self.check_reachable(known.node)
        made = Captured(known.id, known.deployment, known.manifest_digest)
        # Again, because the first time may have failed: published without it, nobody would restore it.
        await self._registry.save_captured(made)
        self._inventory.put_captured(made)
        self._inventory.put_snapshot(await self._nodes.publish(known.node, snapshot))
        for node in self._inventory.nodes.values():
            if node.object_store and node.id != known.node and self._ready(node.id):
                await self._fleet.refresh_snapshots(node.id)

    def prefetch_node(self, snapshot: str, wanted: str = "") -> str:
        """Where to bring a published snapshot.

        Args:
            wanted: a node's id; empty: one that holds it or, when none does, the one a start would choose.

        Raises:
            NotFound: the controller knows no such snapshot, or no such node.
            FailedPrecondition: SNAPSHOT_OUT_OF_REACH, no node that is ready may restore it from the store.
        """
        self._inventory.snapshot(snapshot)
        if wanted:
            self.check_reachable(wanted)
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
        """Have a node bring a published snapshot to itself; one that it holds is left as it is.

        Raises:
            DataLoss: it is damaged, and quarantined there.
            DumontError: what the node says.
        """
        made = self._inventory.captured.get(snapshot)
        try:
            found = await self._nodes.prefetch(node, snapshot, made.manifest_digest if made else "")
        except DumontError:
            await self._fleet.refresh_snapshots(node)
            raise
        self._inventory.put_snapshot(found)
        return self._inventory.snapshot(snapshot)

    async def stored(self, snapshot: Snapshot) -> StoredSnapshot | None:
        """What a published snapshot takes in the object store; None when no node can say."""
        try:
            return (await self._nodes.get_snapshot(snapshot.node, snapshot.id)).stored
        except DumontError as error:
            log.info("sizes_unknown", snapshot=snapshot.id, node=snapshot.node, reason=error.reason)
            return None

    async def verify(self, snapshot: str) -> Verified:
        """Read all of it, on its node and in the object store.

        Raises:
            NotFound: the controller knows no such snapshot.
            DataLoss: it is damaged, and quarantined.
        """
        known = self._inventory.snapshot(snapshot)
        self.check_reachable(known.node)
        try:
            return await self._nodes.verify(known.node, snapshot)
        except DumontError:
            await self._fleet.refresh_snapshots(known.node)
            raise

    def store_node(self) -> str:
        """A ready node with an object store.

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
        return await self._nodes.prune(node, dry_run)

    def _ready(self, node: str) -> bool:
        return self._inventory.nodes[node].state is NodeState.READY

    async def capture(self, instance: str, snapshot: str) -> Snapshot:
        """Make a snapshot of an instance. The move to CAPTURING happens before anything is awaited.

        Raises:
            FailedPrecondition: INSTANCE_BUSY, ILLEGAL_TRANSITION, or what the node says.
            Unavailable: it was made, and could not be written down.
        """
        known = self._inventory.begin(instance, Event.CAPTURE)
        try:
            captured = await self._nodes.capture(known.node, instance, snapshot)
        except BaseException:
            self._inventory.finish(instance, Event.REFUSED)
            raise
        made = Captured(captured.id, captured.deployment, captured.manifest_digest)
        self._inventory.put_captured(made)
        self._inventory.put_snapshot(captured)
        self._inventory.finish(instance, Event.CAPTURED)
        await self._registry.save_captured(made)
        return captured

    def check_reachable(self, node: str) -> None:
        """Raises: Unavailable, nothing is sent to this node at present."""
        if self._inventory.node(node).state is not NodeState.READY:
            raise Unavailable(
                NODE_UNAVAILABLE,
                f"nodes/{node} is {self._inventory.node(node).state.name.lower()}; try again later",
                metadata={"node": f"nodes/{node}"},
                retry_after=1.0,
            )

    async def refresh(self, instance: str) -> None:
        """Ask the node what an instance really is."""
        known = self._inventory.instances.get(instance)
        if known is None:
            return
        try:
            report = await self._nodes.get_instance(known.node, instance)
        except NotFound:
            self._inventory.removed(instance)
        except DumontError as error:
            if error.reason == NODE_UNAVAILABLE:
                self._fleet.recheck(known.node)
        else:
            self._inventory.report(known.node, report)

    async def _stop(self, node: str, instance: str) -> None:
        try:
            await self._nodes.stop(node, instance)
        except NotFound:
            log.info("instance_was_gone", instance=instance, node=node)

    async def _command(
        self,
        instance: str,
        event: Event,
        call: Callable[[str, str], Awaitable[Report | None]],
        force: bool = False,
    ) -> None:
        self.check_reachable(self._inventory.instance(instance).node)
        node = self._inventory.begin(instance, event, force).node
        await asyncio.shield(
            self._tasks.spawn(self._carry_out(node, instance, call), f"{event.name.lower()} {instance}")
        )

    async def _carry_out(
        self, node: str, instance: str, call: Callable[[str, str], Awaitable[Report | None]]
    ) -> None:
        try:
            report = await call(node, instance)
        except BaseException as error:
            self._inventory.finish(instance, Event.REFUSED)
            if isinstance(error, DumontError):
                await self.refresh(instance)
            raise
        state = Event.SAW_GONE if report is None else SAW[report.state]
        self._inventory.finish(instance, state, report)

"""Commands to instances and snapshots: begin, call the node, finish; after a refusal ask what is true."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from controller.fleet import Fleet
from controller.inventory import Inventory
from controller.machine import SAW, Event
from controller.model import Instance, NodeState, Report, Snapshot
from controller.ports import Nodes
from controller.tasks import Tasks
from dumont.errors import DumontError, NotFound, Unavailable

log = structlog.get_logger()

NODE_UNAVAILABLE = "NODE_UNAVAILABLE"


class Commands:
    """Each command runs to its end once it was sent, even when its caller leaves."""

    def __init__(self, nodes: Nodes, inventory: Inventory, fleet: Fleet, tasks: Tasks) -> None:
        self._nodes = nodes
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
        """Delete it; one that is gone already counts as deleted.

        Raises:
            NotFound: the controller knows no such snapshot.
            DumontError: what the node says.
        """
        known = self._inventory.snapshot(snapshot)
        self.check_reachable(known.node)
        try:
            await self._nodes.delete_snapshot(known.node, snapshot)
        except NotFound:
            log.info("snapshot_was_gone", snapshot=snapshot, node=known.node)
        self._inventory.drop_snapshot(snapshot)

    async def capture(self, instance: str, snapshot: str) -> Snapshot:
        """Make a snapshot of an instance. The move to CAPTURING happens before anything is awaited.

        Raises:
            FailedPrecondition: INSTANCE_BUSY, ILLEGAL_TRANSITION, or what the node says.
        """
        known = self._inventory.begin(instance, Event.CAPTURE)
        try:
            captured = await self._nodes.capture(known.node, instance, snapshot)
        except BaseException:
            self._inventory.finish(instance, Event.REFUSED)
            raise
        self._inventory.put_snapshot(captured)
        self._inventory.finish(instance, Event.CAPTURED)
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

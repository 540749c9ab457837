"""The controller put together over any ports; ``main`` gives it the real ones, tests those in memory."""

from __future__ import annotations

from dataclasses import dataclass

from controller.catalogue import Catalogue
from controller.commands import Commands
from controller.fleet import Fleet
from controller.inventory import Inventory
from controller.launcher import Launcher
from controller.metrics import Metrics
from controller.ports import Clock, Nodes, Registry
from controller.reconciler import Reconciler
from controller.serving import Serving
from controller.starter import Starter
from controller.tasks import Tasks


@dataclass(frozen=True)
class Controller:
    """Its parts. Made by ``assemble``, ended by ``close``; the ports stay their maker's."""

    tasks: Tasks
    metrics: Metrics
    clock: Clock
    nodes: Nodes
    inventory: Inventory
    catalogue: Catalogue
    fleet: Fleet
    commands: Commands
    starter: Starter
    serving: Serving
    reconciler: Reconciler

    async def close(self) -> None:
        """End every task and store what is not stored yet."""
        await self.tasks.close()
        await self.catalogue.save_last_use()


async def assemble(nodes: Nodes, registry: Registry, clock: Clock, heartbeat: float = 5.0) -> Controller:
    """Read the registry, follow the nodes it knows, and begin to reconcile.

    Args:
        nodes: the nodes' snapshotds.
        registry: what the controller before this one left.
        clock: the time.
        heartbeat: seconds between a node's heartbeats; three missing ones make it unreachable.
    """
    tasks, metrics, inventory = Tasks(), Metrics(), Inventory(clock)
    catalogue = Catalogue(registry, nodes, inventory, clock)
    fleet = Fleet(nodes, registry, inventory, clock, tasks)
    commands = Commands(nodes, registry, inventory, fleet, tasks)
    launcher = Launcher(nodes, registry, inventory, catalogue, fleet, commands, clock, tasks, metrics)
    starter = Starter(launcher, inventory, catalogue, fleet, commands, clock, tasks)
    serving = Serving(starter, nodes, catalogue, clock, metrics)
    reconciler = Reconciler(
        inventory, catalogue, fleet, starter, commands, clock, tasks, metrics, silence=3 * heartbeat
    )
    stored = await registry.load()
    catalogue.load(stored.deployments, stored.last_use or {})
    for captured in stored.captured:
        inventory.put_captured(captured)
    fleet.load(stored.nodes, stored.intents)
    tasks.spawn(reconciler.run(), "reconcile")
    return Controller(
        tasks, metrics, clock, nodes, inventory, catalogue, fleet, commands, starter, serving, reconciler
    )

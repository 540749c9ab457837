"""What the parts of the controller have in common, handed to each as one value."""

from __future__ import annotations

from dataclasses import dataclass

from controller.deployments import Deployments
from controller.fleet import Fleet
from controller.inventory import Inventory
from controller.membership import Membership
from controller.metrics import Metrics
from controller.ports import Clock, Nodes, Registry
from controller.tasks import Tasks


@dataclass(frozen=True, slots=True)
class Core:
    """The ports, the facts kept in memory, and the owner of background tasks."""

    nodes: Nodes
    registry: Registry
    clock: Clock
    inventory: Inventory
    deployments: Deployments
    fleet: Fleet
    tasks: Tasks
    metrics: Metrics
    membership: Membership

    def now(self) -> float:
        """Monotonic time in seconds."""
        return self.clock.moment().monotonic

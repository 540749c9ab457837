"""The controller put together over any ports; ``main`` passes the real ones, tests pass fakes."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from controller.core import Core
from controller.deployments import Deployments
from controller.fleet import Fleet
from controller.identity import Established
from controller.instances import YIELD_SECONDS, Instances
from controller.inventory import Inventory
from controller.membership import Membership
from controller.metrics import Metrics
from controller.migration import Migrations
from controller.ports import Clock, Nodes, Registry
from controller.queue import DEFAULT_LENGTH
from controller.reconciler import Reconciler
from controller.serving import Serving
from controller.snapshots import Snapshots
from controller.starts.starts import Starts
from controller.succession import Succession
from controller.tasks import Tasks
from dumont.errors import DumontError

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Controller:
    """The parts. ``assemble`` makes them and ``close`` ends them; the ports stay their maker's."""

    core: Core
    instances: Instances
    snapshots: Snapshots
    starts: Starts
    migrations: Migrations
    serving: Serving
    reconciler: Reconciler
    succession: Succession

    async def close(self) -> None:
        """End every task and store what is not stored yet, if the database takes it."""
        await self.core.tasks.close()
        # The database takes nothing of a session that has ended.
        # Leaving frees what it held, so that nobody has to wait until the session expires.
        for last_words in (self.core.deployments.save_last_use, self.core.registry.leave):
            try:
                await last_words()
            except DumontError as error:
                log.warning("not_stored_at_the_end", reason=error.reason, error=error.message)


async def assemble(
    nodes: Nodes,
    registry: Registry,
    clock: Clock,
    who: Established,
    heartbeat: float = 5.0,
    max_queue: int = DEFAULT_LENGTH,
    prune_every: float = 0.0,
    lease: float = 10.0,
    membership: Membership | None = None,
    rebalance: bool = True,
    yield_seconds: float = YIELD_SECONDS,
) -> Controller:
    """Read the registry, follow the nodes it knows, and begin to reconcile.

    Args:
        nodes: the nodes' snapshotds.
        registry: what the previous controller left.
        clock: the time.
        who: this controller, as the registry has it since ``join``.
        heartbeat: seconds between a node's heartbeats; three missing ones make it unreachable.
        max_queue: requests that may wait for one deployment.
        prune_every: seconds between two prunings of each object store; 0: never.
        lease: seconds after which another controller takes this one's place unless it renews its session.
        membership: the facts about the session, if others have them too.
        rebalance: whether idle instances leave crowded GPUs.
        yield_seconds: how long an instance that makes room for a higher priority answers its requests.
    """
    tasks, inventory = Tasks(), Inventory(clock)
    membership = membership or Membership(who.identity.starts)
    deployments = Deployments(registry, nodes, inventory, clock, membership)
    fleet = Fleet(nodes, registry, inventory, clock, tasks, who.identity.id)
    core = Core(nodes, registry, clock, inventory, deployments, fleet, tasks, Metrics(), membership)
    instances, snapshots = Instances(core, yield_seconds), Snapshots(core)
    starts = Starts(core, instances, max_queue)
    migrations = Migrations(core, starts, instances, snapshots)
    serving = Serving(core, starts, instances)
    reconciler = Reconciler(
        core,
        starts,
        instances,
        snapshots,
        migrations,
        silence=3 * heartbeat,
        prune_every=prune_every,
        rebalance=rebalance,
    )
    succession = Succession(core, lease)
    # What nobody holds any more is this controller's.
    await registry.claim()
    stored = await registry.load()
    membership.learn(stored.members, stored.holders)
    last_use = dict(stored.last_use or {})
    if who.outdated:
        # Used since, for all that is known: nothing expires by what an old copy of the database says.
        last_use = dict.fromkeys((deployment.id for deployment in stored.deployments), clock.moment().wall)
    deployments.load(stored.deployments, last_use)
    for captured in stored.captured:
        inventory.put_captured(captured)
    for intent in stored.intents:
        if membership.mine(intent.deployment):
            inventory.put_intent(intent)
    fleet.load(stored.nodes)
    tasks.spawn(reconciler.run(), "reconcile")
    tasks.spawn(succession.run(), "keep the session")
    return Controller(core, instances, snapshots, starts, migrations, serving, reconciler, succession)

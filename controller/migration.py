"""Bring an instance to another GPU or node. The source serves until the other one does.

Between nodes an instance keeps no identity: the target gets an instance of its own, restored from the
deployment's snapshot. From the moment at which that one serves, new requests go there. The source answers the
prompts that it has, and then the reconciler stops it. A step that fails leaves the source serving as before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from controller import balance, policy, transfer
from controller.core import Core
from controller.instances import Instances
from controller.model import Deployment, Instance, InstanceState, Node, NodeState, StartMode
from controller.snapshots import Snapshots
from controller.starts.starts import Starts
from dumont import names
from dumont.errors import Aborted, DumontError, FailedPrecondition

log = structlog.get_logger()

# Called with each stage: "waiting", "moving", "capturing", "publishing", "restoring", "starting", "draining".
OnStage = Callable[[str], None]
# States of an instance that may be brought elsewhere.
MOVABLE = (InstanceState.SERVING, InstanceState.PARKED)
ENDING = (InstanceState.STOPPING, InstanceState.FAILED, InstanceState.GONE)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where an instance is to go. ``gpu`` is of its own node; without either, the controller chooses a node.

    ``cold``: the model may be loaded again on the node if no snapshot can be brought there.
    """

    node: str = ""
    gpu: str = ""
    cold: bool = False


class Migrations:
    """Brings instances elsewhere, one at a time for each instance.

    Args:
        core: the ports and the facts.
        starts: where nothing else is started for a deployment meanwhile.
        instances: the commands to instances.
        snapshots: the commands to snapshots.
    """

    def __init__(self, core: Core, starts: Starts, instances: Instances, snapshots: Snapshots) -> None:
        self._core = core
        self._inventory = core.inventory
        self._starts = starts
        self._instances = instances
        self._snapshots = snapshots
        self._under_way: set[str] = set()
        # Why instances could not leave a draining node: reason and message by instance.
        self.refused: dict[str, tuple[str, str]] = {}

    async def evacuate(self, instance: str) -> None:
        """Bring an instance off its node: a serving one to another node, cold if need be.

        A parked one only ends: its deployment wakes elsewhere from its snapshot, which the drain publishes.

        Raises:
            DumontError: it could not be brought elsewhere; ``refused`` has the reason until it leaves.
        """
        known = self._inventory.instance(instance)
        try:
            if known.state is InstanceState.PARKED:
                await self._instances.stop(instance)
            else:
                await self.migrate(instance, Destination(cold=True))
        except DumontError as error:
            self.refused[instance] = (error.reason, error.message)
            raise
        finally:
            if instance not in self._inventory.instances:
                self.refused.pop(instance, None)
            self._inventory.touch(f"nodes/{known.node}")

    async def drain(
        self, node: str, timeout: float | None, on_left: Callable[[int], None] = lambda left: None
    ) -> tuple[balance.Remainder, ...]:
        """Have a node drained, and wait until it is as empty as it can become.

        The node goes on draining after this, also when this is cancelled, until it is undrained.

        Args:
            node: its id.
            timeout: seconds after which to return with what is left; None: no limit.
            on_left: called with the number of instances on the node when that changes.

        Returns:
            What is left on the node, and why.

        Raises:
            NotFound: there is no such node.
            Unavailable: it could not be stored that the node drains.
        """
        for left in self._inventory.instances_on(self._inventory.node(node).id):
            self.refused.pop(left.id, None)
        await self._core.fleet.set_draining(node, True)
        counted = -1

        def settled() -> bool:
            nonlocal counted
            known = self._inventory.instances_on(node)
            if len(known) != counted:
                counted = len(known)
                on_left(counted)
            owned = self._core.deployments.owned(known)
            stuck = (i.id not in owned or (i.id in self.refused and not i.in_flight) for i in known)
            return not self._inventory.node(node).draining or all(stuck)

        emptied = asyncio.ensure_future(self._inventory.until(settled, f"nodes/{node}"))
        waits: set[asyncio.Future[None]] = {emptied}
        if timeout is not None:
            waits.add(asyncio.ensure_future(self._core.clock.sleep(timeout)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        known = self._inventory.instances_on(node)
        return balance.remainder(known, self._core.deployments.owned(known), self.refused)

    async def migrate(
        self, instance: str, to: Destination, on_stage: OnStage = lambda stage: None
    ) -> Instance:
        """Bring an instance to another GPU of its node, or to another node.

        Args:
            instance: its id.
            to: where it goes.
            on_stage: called at each stage.

        Returns:
            The instance that serves now: the same one on another GPU, another one on another node.

        Raises:
            NotFound: there is no such instance, or no such node.
            FailedPrecondition: it cannot be brought there; the message says why, and nothing has changed.
            Aborted: MIGRATION_UNDER_WAY, or TARGET_LOST: the new instance ended before the source did.
            DumontError: a step failed; the source serves as before.
        """
        self.check(instance, to)
        self._under_way.add(instance)
        try:
            if to.gpu:
                on_stage("moving")
                return await self._instances.move(instance, to.gpu)
            return await self._bring(instance, to, on_stage)
        finally:
            self._under_way.discard(instance)

    def check(self, instance: str, to: Destination) -> None:
        """Raise what ``migrate`` would raise at once."""
        known = self._inventory.instance(instance)
        metadata = {"instance": f"instances/{instance}"}
        if instance in self._under_way or known.draining:
            raise Aborted(
                "MIGRATION_UNDER_WAY",
                f"instances/{instance} is being migrated already; wait until it has arrived",
                metadata=metadata,
                retry_after=1.0,
            )
        deployment = self._owner(known)
        self._core.fleet.check_reachable(known.node)
        if to.gpu and to.node not in ("", known.node):
            raise FailedPrecondition(
                "GPU_OF_ANOTHER_NODE",
                f"instances/{instance} is on nodes/{known.node}, and a GPU can be named on that node only; "
                "name the other node alone, which chooses one of its GPUs",
                field="gpu",
                metadata=metadata,
            )
        if known.state not in (MOVABLE[:1] if to.gpu else MOVABLE):
            raise FailedPrecondition(
                "INSTANCE_NOT_SERVING",
                f"instances/{instance} is {known.state.name.lower()} and cannot be migrated now; "
                + ("resume it first" if known.state is InstanceState.PARKED else "wait until it serves"),
                metadata=metadata,
            )
        if not to.gpu:
            self._way(deployment, known, self._target(deployment, known, to), to)

    def _owner(self, known: Instance) -> Deployment:
        """The deployment of an instance. Raises: FailedPrecondition, ORPHAN."""
        owner = self._core.deployments.by_id.get(known.deployment)
        if owner is None or not owner.runs(known.report):
            raise FailedPrecondition(
                "ORPHAN",
                f"instances/{known.id} is no deployment's of this controller, so it stays where it is; stop "
                "it, or create a deployment of its name and model",
                metadata={"instance": f"instances/{known.id}"},
            )
        return self._core.deployments.get_active(owner.id)

    def _target(self, deployment: Deployment, known: Instance, to: Destination) -> Node:
        if to.node == known.node:
            raise FailedPrecondition(
                "SAME_NODE",
                f"instances/{known.id} is on nodes/{known.node} already; name another node, or a GPU of it",
                field="node",
                metadata={"instance": f"instances/{known.id}", "node": f"nodes/{known.node}"},
            )
        if to.node:
            return self._inventory.node(to.node)
        others = {node.id: node for node in self._inventory.nodes.values() if node.id != known.node}
        # A node that a snapshot can be brought to comes first, however much memory others have.
        within_reach = {node.id: node for node in others.values() if self._reaches(deployment, known, node)}
        return policy.place(
            within_reach or others,
            publishing=bool(self._inventory.node(known.node).object_store),
            engine=known.report.engine,
        )

    def _reaches(self, deployment: Deployment, known: Instance, target: Node) -> bool:
        """Whether a snapshot can be brought to a node."""
        try:
            self._way(deployment, known, target, Destination())
        except DumontError:
            return False
        return True

    def _way(self, deployment: Deployment, known: Instance, target: Node, to: Destination) -> transfer.Way:
        copies = self._inventory.copies_of(deployment.id)
        return transfer.find(
            transfer.Facts(
                deployment=deployment,
                instance=known,
                target=target,
                nodes=self._inventory.nodes,
                snapshots=tuple(copy for copy in copies if copy.owner == deployment.uid),
                cold=to.cold,
            )
        )

    async def _bring(self, instance: str, to: Destination, on_stage: OnStage) -> Instance:
        known = self._inventory.instance(instance)
        made: list[str] = []
        on_stage("waiting")
        try:
            await self._starts.alone(
                known.deployment, lambda: self._make_successor(instance, to, on_stage, made.append)
            )
            (successor,) = made
            self._inventory.set_draining(instance, True)
            on_stage("draining")
            await self._ended(known, successor)
        except BaseException:
            self._unwind(instance, made)
            raise
        log.info("migrated", instance=instance, successor=successor, node=known.node)
        return self._inventory.instance(successor)

    def _unwind(self, instance: str, successors: Iterable[str]) -> None:
        """The source serves as before, and what was to take its place goes, unless only that is left."""
        known = self._inventory.instances.get(instance)
        if known is None or known.state in ENDING:
            return
        self._inventory.set_draining(instance, False)
        for successor in successors:
            self._inventory.set_draining(successor, True)

    async def _make_successor(
        self, instance: str, to: Destination, on_stage: OnStage, on_made: Callable[[str], None]
    ) -> None:
        """Make an instance on the target; ``on_made`` is called with its id as soon as it serves."""
        known = self._inventory.instance(instance)
        deployment = self._owner(known)
        target = self._target(deployment, known, to)
        way = self._way(deployment, known, target, to)
        snapshot = way.snapshot
        log.info("migrating", instance=instance, node=target.id, because=way.reason)
        if way.capture:
            on_stage("capturing")
            snapshot = names.new_id(deployment.id[:48].rstrip("-"))
            await self._instances.capture(deployment, instance, snapshot)
        if way.publish or way.capture:
            on_stage("publishing")
            await self._snapshots.publish(snapshot)
            # Only now does the target say whether it can restore it.
            restorable = self._way(deployment, known, target, to)
            found = not (restorable.publish or restorable.capture)
            if not found and not to.cold:
                raise FailedPrecondition(
                    "SNAPSHOT_OUT_OF_REACH",
                    f"nodes/{target.id} does not find snapshots/{snapshot}, which was published; have its "
                    f"snapshotd trust the key of nodes/{known.node}, or allow a cold start there (--cold)",
                    metadata={"node": f"nodes/{target.id}"},
                )
            snapshot = restorable.snapshot if found else ""
        on_stage("restoring" if snapshot else "starting")
        at = self._starts.at(deployment.id, target.id)
        if at.snapshot or not snapshot:
            created = await self._instances.create(
                deployment, target.id, at.snapshot, at.gpu, at.need, at.yields
            )
        else:
            # Its start mode restores no snapshots, but a migration may.
            created = await self._instances.create(deployment, target.id, snapshot)
        successor = created.instance
        on_made(successor)
        if not snapshot and deployment.start_mode is StartMode.CHECKPOINT and target.checkpoint_capable:
            # As in any first start, before a prompt enters it.
            with contextlib.suppress(DumontError):
                await self._instances.capture(
                    deployment, successor, names.new_id(deployment.id[:48].rstrip("-"))
                )

    async def _ended(self, source: Instance, successor: str) -> None:
        """Wait until the source has answered its prompts and the reconciler has stopped it.

        Raises:
            Aborted: TARGET_LOST.
        """

        def lost() -> bool:
            new = self._inventory.instances.get(successor)
            return new is None or new.state in ENDING

        def settled() -> bool:
            # What is on a node that does not answer gets no requests, and is judged when the node answers.
            silent = self._inventory.node(source.node).state is NodeState.UNREACHABLE
            left = self._inventory.instances.get(source.id)
            return left is None or left.state is InstanceState.FAILED or silent or lost()

        await self._inventory.until(settled, f"deployments/{source.deployment}", f"nodes/{source.node}")
        if lost():
            left = self._inventory.instances.get(source.id)
            serves = left is not None and left.state not in ENDING
            raise Aborted(
                "TARGET_LOST",
                f"instances/{successor}, which was to take the place of instances/{source.id}, ended; "
                + ("the source serves as before" if serves else "the next request starts another one"),
                metadata={"instance": f"instances/{source.id}", "successor": f"instances/{successor}"},
            )

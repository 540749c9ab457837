"""Commands to instances: mark one as under way, call the node, mark its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog

from controller.core import Core
from controller.lifecycle import SAW, Event
from controller.model import (
    Captured,
    Deployment,
    Instance,
    InstanceState,
    Intent,
    Phase,
    Report,
    Snapshot,
    total_seconds,
)
from controller.ports import NODE_UNAVAILABLE
from dumont import names
from dumont.errors import DumontError, NotFound

log = structlog.get_logger()

# Reasons of an instance that is healthy and only cannot answer at the moment.
TEMPORARY = frozenset({"INSTANCE_NOT_READY", "INSTANCE_DRAINING"})


@dataclass(frozen=True, slots=True)
class Created:
    """The id of a new instance that serves, and the steps of making it."""

    instance: str
    phases: tuple[Phase, ...]


class Instances:
    """Commands to instances. One that was sent runs to its end, even when its caller leaves."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._inventory = core.inventory

    async def create(self, deployment: Deployment, node: str, snapshot: str = "") -> Created:
        """Start an instance on a node, or restore it from ``snapshot`` unless that is empty.

        Nothing is awaited between the instance's first moment of serving and the return, so that the
        caller may capture it before any prompt enters it. When the start fails, what the node may
        have left of it is stopped in the background.

        Raises:
            DumontError: what the node says; Unavailable, the intent could not be stored.
        """
        core = self._core
        instance = names.new_id(deployment.id[:48].rstrip("-"))
        intent = Intent(instance, deployment.id, node, snapshot, core.clock.moment().wall)
        # Expected first: a node that is asked in the meantime would report an instance nobody knows.
        self._inventory.expect(intent)
        began = core.now()
        try:
            await core.registry.save_intent(intent)
            sent = core.now()
            if snapshot:
                captured = self._inventory.captured.get(snapshot)
                digest = captured.manifest_digest if captured else ""
                report = await core.nodes.restore(node, instance, deployment.id, snapshot, digest)
            else:
                weights, options = deployment.checkpoint.weights, deployment.engine_options
                report = await core.nodes.start(
                    node, instance, deployment.id, deployment.model, deployment.engine, weights, options
                )
        except BaseException as error:
            self._inventory.finish(instance, Event.REFUSED)
            core.tasks.spawn(self._clean_up(node, instance, error), f"clean up {instance}")
            if snapshot and isinstance(error, DumontError):
                # The failure may have quarantined the snapshot; the next decision must know.
                await self._refresh_snapshots(node)
            raise
        self._inventory.finish(instance, SAW[report.state], report)
        if snapshot and not any(c.local for c in self._inventory.copies(snapshot) if c.node == node):
            # The node fetched it, so it holds it now.
            core.tasks.spawn(self._refresh_snapshots(node), f"refresh snapshots of {node}")
        return Created(instance, (Phase("record", sent - began), *node_phases(report, core.now() - sent)))

    async def park(self, instance: str) -> Instance:
        """Freeze an instance; its process stays.

        Raises:
            NotFound: there is no such instance.
            FailedPrecondition: ILLEGAL_TRANSITION, INSTANCE_BUSY, or what the node says.
            Unavailable: its node cannot be reached.
        """
        await self._command(instance, Event.PARK, self._core.nodes.park)
        return self._inventory.instance(instance)

    async def resume(self, instance: str) -> Instance:
        """Let a parked instance go on. Raises like ``park``."""
        await self._command(instance, Event.RESUME, self._core.nodes.resume)
        return self._inventory.instance(instance)

    async def move(self, instance: str, gpu: str) -> Instance:
        """Bring a serving instance to another GPU of its node. Raises like ``park``.

        Args:
            instance: its id.
            gpu: the GPU's UUID, or its index on the node.
        """

        async def call(node: str, moved: str) -> Report:
            return await self._core.nodes.move(node, moved, gpu)

        await self._command(instance, Event.MOVE, call, force=True)
        return self._inventory.instance(instance)

    async def stop(self, instance: str, force: bool = False) -> None:
        """End an instance; one that is already gone counts as ended. Raises like ``park``.

        Args:
            instance: its id.
            force: end it even while it answers requests.
        """
        await self._command(instance, Event.STOP, self._stop, force)

    async def capture(self, deployment: Deployment, instance: str, snapshot: str) -> Snapshot:
        """Make a snapshot of an instance, which enters CAPTURING before anything is awaited.

        Args:
            deployment: whose snapshot it will be.
            instance: its id.
            snapshot: the new snapshot's id.

        Raises:
            FailedPrecondition: INSTANCE_BUSY, ILLEGAL_TRANSITION, or what the node says.
            Unavailable: the snapshot was made, and could not be recorded.
        """
        try:
            captured = await self._capture(deployment, instance, snapshot)
        except DumontError:
            self._core.metrics.captures.labels("failed").inc()
            await self.refresh(instance)
            raise
        self._core.metrics.captures.labels("ok").inc()
        return captured

    async def refresh(self, instance: str) -> None:
        """Ask the node for an instance's true state."""
        known = self._inventory.instances.get(instance)
        if known is None:
            return
        try:
            report = await self._core.nodes.get_instance(known.node, instance)
        except NotFound:
            self._inventory.removed(instance)
        except DumontError as error:
            if error.reason == NODE_UNAVAILABLE:
                self._core.fleet.recheck(known.node)
        else:
            self._inventory.report(known.node, report)

    async def diagnose(self, instance: str, error: DumontError) -> str:
        """An instance did not answer a request: ask what is left of it, and stop it if it is broken.

        Returns:
            The reason to report for the next attempt.
        """
        known = self._inventory.instances.get(instance)
        if known is not None and error.reason == NODE_UNAVAILABLE:
            self._core.fleet.recheck(known.node)
        elif known is not None:
            await self.refresh(instance)
            if error.reason not in TEMPORARY and self._serves(instance):
                log.warning("instance_lost", instance=instance, reason=error.reason)
                self._core.tasks.spawn(self.stop(instance, force=True), f"stop {instance}")
                # One turn of the event loop, in which it leaves the state in which requests reach it.
                await asyncio.sleep(0)
        return f"instances/{instance} did not answer: {error.reason}: {error.message}"

    def _serves(self, instance: str) -> bool:
        known = self._inventory.instances.get(instance)
        return known is not None and known.state is InstanceState.SERVING and not known.busy

    async def _capture(self, deployment: Deployment, instance: str, snapshot: str) -> Snapshot:
        known = self._inventory.begin(instance, Event.CAPTURE)
        try:
            # Recorded before it exists: should this controller die now, the next one knows it as its own.
            record = Captured(snapshot, deployment.id, deployment.uid, "", known.node)
            self._inventory.put_captured(record)
            await self._core.registry.save_captured(record)
            captured = await self._core.nodes.capture(known.node, instance, snapshot)
        except BaseException as error:
            self._inventory.finish(instance, Event.REFUSED)
            if isinstance(error, DumontError) and error.reason != NODE_UNAVAILABLE:
                self._inventory.drop_captured(snapshot)
                self._core.tasks.spawn(self._core.registry.drop_captured(snapshot), f"drop {snapshot}")
            raise
        record = replace(record, manifest_digest=captured.manifest_digest)
        self._inventory.put_captured(record)
        self._inventory.put_snapshot(captured)
        self._inventory.finish(instance, Event.CAPTURED)
        await self._core.registry.save_captured(record)
        return self._inventory.snapshot(snapshot)

    async def _clean_up(self, node: str, instance: str, error: BaseException) -> None:
        if getattr(error, "reason", "") != NODE_UNAVAILABLE:
            try:
                await self.stop(instance)
            except DumontError as failure:
                log.warning("clean_up_failed", node=node, instance=instance, reason=failure.reason)
        else:
            # It may well have started. The node reports it once it answers again.
            self._inventory.lost(instance)

    async def _refresh_snapshots(self, node: str) -> None:
        try:
            await self._core.fleet.refresh_snapshots(node)
        except DumontError as error:
            log.warning("refresh_snapshots_failed", node=node, reason=error.reason)

    async def _stop(self, node: str, instance: str) -> None:
        try:
            await self._core.nodes.stop(node, instance)
        except NotFound:
            log.info("instance_already_gone", instance=instance, node=node)

    async def _command(
        self,
        instance: str,
        event: Event,
        call: Callable[[str, str], Awaitable[Report | None]],
        force: bool = False,
    ) -> None:
        self._core.fleet.check_reachable(self._inventory.instance(instance).node)
        node = self._inventory.begin(instance, event, force).node
        await asyncio.shield(
            self._core.tasks.spawn(self._carry_out(node, instance, call), f"{event.name.lower()} {instance}")
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


def node_phases(report: Report, seconds: float) -> tuple[Phase, ...]:
    """The node's own steps of a call that took ``seconds``; the way there and back is "dispatch"."""
    dispatch = max(0.0, seconds - total_seconds(report.phases))
    return (Phase("dispatch", dispatch), *report.phases)

"""Commands to instances: mark one as under way, call the node, mark its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import structlog

from controller.core import Core
from controller.estimates import Work
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
from controller.room import How, Need, Yield
from dumont import names
from dumont.errors import Aborted, DumontError, NotFound, Unavailable

log = structlog.get_logger()

# The reason of a request that was ended because its instance had to make room.
PREEMPTED: Final = "PREEMPTED"
# How long an instance that makes room answers its requests, and how long those that are ended take to leave.
YIELD_SECONDS: Final = 10.0
INTERRUPTED_SECONDS: Final = 2.0
# A park that fails for one of these reasons says nothing about whether the instance can be parked.
TRANSIENT = frozenset({"INSTANCE_BUSY", "ILLEGAL_TRANSITION", "INSTANCE_NOT_FOUND", NODE_UNAVAILABLE})
# Reasons of an instance that is healthy and only cannot answer at the moment.
TEMPORARY = frozenset({"INSTANCE_NOT_READY", "INSTANCE_DRAINING"})


@dataclass(frozen=True, slots=True)
class Created:
    """The id of a new instance that serves, and the steps of making it."""

    instance: str
    phases: tuple[Phase, ...]


class Interruption:
    """A request that an instance answers; ``error`` is set when it is ended to make room."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        self._cancel = cancel
        self.error: DumontError | None = None

    def interrupt(self, error: DumontError) -> None:
        """End the request with ``error``."""
        self.error = error
        self._cancel()


class Instances:
    """Commands to instances. One that was sent runs to its end, even when its caller leaves.

    Args:
        core: the ports and the facts.
        yield_seconds: how long an instance that makes room for a higher priority answers its requests.
    """

    def __init__(self, core: Core, yield_seconds: float = YIELD_SECONDS) -> None:
        self._core = core
        self._inventory = core.inventory
        self._yield_seconds = yield_seconds
        self._requests: dict[str, set[Interruption]] = {}

    async def create(
        self,
        deployment: Deployment,
        node: str,
        snapshot: str = "",
        gpu: str = "",
        need: Need | None = None,
        yields: Sequence[Yield] = (),
    ) -> Created:
        """Start an instance on a node, or restore it from ``snapshot`` unless that is empty.

        Args:
            deployment: whose instance it will be.
            node: the node's id.
            snapshot: the snapshot's id; empty: the model is loaded.
            gpu: the UUID of the GPU to use; empty: the node chooses.
            need: what it will take; nobody else is given that from now on.
            yields: the instances that make room first, as decided just now.

        Nothing is awaited between the instance's first moment of serving and the return, so that the
        caller may capture it before any prompt enters it. When the start fails, what the node may
        have left of it is stopped in the background.

        Raises:
            DumontError: what the node says; Unavailable, the intent could not be stored; Aborted,
                ROOM_NOT_MADE.
        """
        core = self._core
        instance = names.new_id(deployment.id[:48].rstrip("-"))
        intent = Intent(instance, deployment.id, node, snapshot, core.clock.moment().wall)
        # Expected first: a node that is asked in the meantime would report an instance nobody knows.
        self._inventory.expect(intent, need)
        room = self._make_room(yields)
        began = core.now()
        try:
            await core.registry.save_intent(intent)
            recorded = core.now()
            await _made(room)
            sent = core.now()
            if snapshot:
                captured = self._inventory.captured.get(snapshot)
                digest = captured.manifest_digest if captured else ""
                report = await core.nodes.restore(node, instance, deployment.id, snapshot, digest, gpu)
            else:
                weights, options = deployment.checkpoint.weights, deployment.engine_options
                report = await core.nodes.start(
                    node,
                    instance,
                    deployment.id,
                    deployment.model,
                    deployment.engine,
                    weights,
                    options,
                    gpu,
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
        phases = [Phase("record", recorded - began)]
        if yields:
            phases.append(Phase("make_room", sent - recorded))
        return Created(instance, (*phases, *node_phases(report, core.now() - sent)))

    async def park(self, instance: str) -> Instance:
        """Freeze an instance; its process stays.

        Raises:
            NotFound: there is no such instance.
            FailedPrecondition: ILLEGAL_TRANSITION, INSTANCE_BUSY, or what the node says.
            Unavailable: its node cannot be reached.
        """
        await self._command(instance, Event.PARK, self._park)
        return self._inventory.instance(instance)

    async def resume(self, instance: str) -> Instance:
        """Let a parked instance go on, where the node chooses. Raises like ``park``."""
        await self.resume_on(instance)
        return self._inventory.instance(instance)

    async def resume_on(
        self, instance: str, gpu: str = "", yields: Sequence[Yield] = ()
    ) -> tuple[Phase, ...]:
        """Let a parked instance go on.

        Args:
            instance: its id.
            gpu: the UUID of the GPU to resume on; empty: the node chooses.
            yields: the instances that make room first, as decided just now.

        Returns:
            The steps.

        Raises:
            Aborted: ROOM_NOT_MADE. Otherwise like ``park``.
        """
        room: asyncio.Future[list[BaseException | None]]
        began = sent = self._core.now()

        async def call(node: str, parked: str) -> Report:
            nonlocal sent
            await _made(room)
            sent = self._core.now()
            return await self._core.nodes.resume(node, parked, gpu)

        resuming = self._begin(instance, Event.RESUME, call)
        # Nobody else is given its memory from now on.
        self._inventory.aim(instance, gpu)
        room = self._make_room(yields)
        await asyncio.shield(resuming)
        phases = node_phases(self._inventory.instance(instance).report, self._core.now() - sent)
        return (Phase("make_room", sent - began), *phases) if yields else phases

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

    # Making room

    @contextmanager
    def interruptible(self, instance: str, cancel: Callable[[], object]) -> Iterator[Interruption]:
        """While the context lasts, an instance that must make room at once ends a request by ``cancel``.

        Its ``error`` then says so.
        """
        interruption = Interruption(cancel)
        requests = self._requests.setdefault(instance, set())
        requests.add(interruption)
        try:
            yield interruption
        finally:
            requests.discard(interruption)
            if not requests and self._requests.get(instance) is requests:
                del self._requests[instance]

    def _make_room(self, yields: Sequence[Yield]) -> asyncio.Future[list[BaseException | None]]:
        """Begin to make room. From now on no request enters these instances. Pass the result to ``_made``."""
        ends: list[asyncio.Task[None]] = []
        parks: list[asyncio.Task[None]] = []
        for one in yields:
            event, tasks = (Event.PARK, parks) if one.how is How.PARK else (Event.STOP, ends)
            node = self._inventory.begin(one.instance, event, force=one.drains).node
            # A park may need the memory of those that end.
            work = self._give_way(node, one, tuple(ends) if one.how is How.PARK else ())
            tasks.append(self._core.tasks.spawn(work, f"{one.how.value} {one.instance} to make room"))
            self._core.metrics.yields.labels(one.how.value, "in use" if one.drains else "idle").inc()
            log.info("instance_yields", instance=one.instance, how=one.how.value, because=one.reason)
        return asyncio.gather(*ends, *parks, return_exceptions=True)

    async def _give_way(self, node: str, one: Yield, after: Collection[asyncio.Task[None]]) -> None:
        async def call(node: str, instance: str) -> Report | None:
            if after:
                await asyncio.wait(after)
            if one.drains:
                await self._drain(instance)
            if one.how is How.PARK:
                return await self._park(node, instance)
            await self._stop(node, instance)
            return None

        try:
            await self._carry_out(node, one.instance, call)
        except DumontError as error:
            if one.how is How.PARK and error.reason not in TRANSIENT:
                self._inventory.refuse_parking(one.instance)
            raise

    async def _drain(self, instance: str) -> None:
        """Wait until an instance has answered its requests; end those that take too long."""

        def answered() -> bool:
            known = self._inventory.instances.get(instance)
            return known is None or not known.in_flight

        if not await self._within(self._yield_seconds, answered, instance):
            error = Unavailable(
                PREEMPTED,
                f"instances/{instance} made room for a deployment of a higher priority; call again",
                metadata={"instance": f"instances/{instance}"},
                retry_after=1.0,
            )
            for request in tuple(self._requests.get(instance, ())):
                request.interrupt(error)
            await self._within(INTERRUPTED_SECONDS, answered, instance)

    async def _within(self, seconds: float, predicate: Callable[[], bool], instance: str) -> bool:
        """Whether ``predicate`` about an instance has come true within so many seconds."""
        deployment = self._inventory.instance(instance).deployment
        waits = [
            asyncio.ensure_future(self._inventory.until(predicate, f"deployments/{deployment}")),
            asyncio.ensure_future(self._core.clock.sleep(seconds)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return predicate()

    async def _park(self, node: str, instance: str) -> Report:
        began = self._core.now()
        report = await self._core.nodes.park(node, instance)
        seconds = self._core.now() - began
        self._inventory.estimates.took(report.deployment, node, Work.PARK, seconds, report.gpu_bytes)
        return report

    async def _stop(self, node: str, instance: str) -> None:
        known, began = self._inventory.instances.get(instance), self._core.now()
        try:
            await self._core.nodes.stop(node, instance)
        except NotFound:
            log.info("instance_already_gone", instance=instance, node=node)
        else:
            if known is not None:
                seconds = self._core.now() - began
                self._inventory.estimates.took(known.deployment, node, Work.STOP, seconds)

    async def _command(
        self,
        instance: str,
        event: Event,
        call: Callable[[str, str], Awaitable[Report | None]],
        force: bool = False,
    ) -> None:
        await asyncio.shield(self._begin(instance, event, call, force))

    def _begin(
        self,
        instance: str,
        event: Event,
        call: Callable[[str, str], Awaitable[Report | None]],
        force: bool = False,
    ) -> asyncio.Task[None]:
        self._core.fleet.check_reachable(self._inventory.instance(instance).node)
        node = self._inventory.begin(instance, event, force).node
        return self._core.tasks.spawn(
            self._carry_out(node, instance, call), f"{event.name.lower()} {instance}"
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


async def _made(room: asyncio.Future[list[BaseException | None]]) -> None:
    """Wait until room is made; it is made even if the caller is cancelled meanwhile.

    Raises:
        Aborted: ROOM_NOT_MADE.
    """
    for error in await asyncio.shield(room):
        if isinstance(error, DumontError):
            raise Aborted(
                "ROOM_NOT_MADE", f"no room was made: {error.reason}: {error.message}", retry_after=1.0
            ) from error
        if error is not None:
            raise error


def node_phases(report: Report, seconds: float) -> tuple[Phase, ...]:
    """The node's own steps of a call that took ``seconds``; the way there and back is "dispatch"."""
    dispatch = max(0.0, seconds - total_seconds(report.phases))
    return (Phase("dispatch", dispatch), *report.phases)

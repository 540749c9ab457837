"""The way from a request to an instance that serves: one start per deployment at a time, shared by all."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import structlog

from controller import policy
from controller.catalogue import Catalogue
from controller.commands import NODE_UNAVAILABLE, Commands
from controller.fleet import Fleet
from controller.inventory import Inventory
from controller.launcher import Launcher, Started, Told
from controller.model import Deployment, DeploymentState, InstanceState, Phase, Snapshot, StartInfo, Tier
from controller.ports import Clock
from controller.tasks import Tasks
from dumont.errors import DumontError, FailedPrecondition, Internal, Unavailable

log = structlog.get_logger()

TRIES = 3
# Refusals of an instance that is well and only does something else just now.
PASSING = frozenset({"INSTANCE_NOT_READY", "INSTANCE_DRAINING"})
QUICK = frozenset({InstanceState.SERVING, InstanceState.PARKED})


class Lease:
    """A request's hold on an instance: it is neither parked nor stopped until ``release``."""

    def __init__(self, info: StartInfo, release: Callable[[], None]) -> None:
        self.info = info
        self._release = release

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()


class Starter:
    """Starts are shared: who asks while one runs waits for it, and who leaves does not end it."""

    def __init__(
        self,
        launcher: Launcher,
        inventory: Inventory,
        catalogue: Catalogue,
        fleet: Fleet,
        commands: Commands,
        clock: Clock,
        tasks: Tasks,
    ) -> None:
        self._launcher = launcher
        self._inventory = inventory
        self._catalogue = catalogue
        self._fleet = fleet
        self._commands = commands
        self._clock = clock
        self._tasks = tasks
        self._runs: dict[str, asyncio.Task[Any]] = {}
        self._capturing: set[str] = set()
        self._waiting: Counter[str] = Counter()
        # Deployments whose last start failed, with what was said.
        self.failures: dict[str, str] = {}

    @property
    def starting(self) -> frozenset[str]:
        """Deployments that a start runs for or a request waits for."""
        return frozenset(self._runs) | frozenset(self._waiting)

    def condition(self, deployment: Deployment) -> tuple[DeploymentState, str]:
        """How a deployment is, and why when it is not active."""
        if deployment.deleting:
            return DeploymentState.DELETING, "its instances and snapshots are being removed"
        if deployment.id in self.failures:
            return DeploymentState.DEGRADED, f"its last start failed: {self.failures[deployment.id]}"
        quick = self._inventory.snapshots_of(deployment.id) or any(
            i.state in QUICK for i in self._inventory.instances_of(deployment.id)
        )
        if deployment.id in self._runs and not quick:
            return DeploymentState.CREATING, "it is being started"
        return DeploymentState.ACTIVE, ""

    # Requests

    async def acquire(self, deployment: str, why: tuple[str, ...] = ()) -> Lease:
        """Wait for an instance that serves, started if need be, and hold it.

        Args:
            deployment: its id.
            why: reasons to begin the start's own with.

        Raises:
            NotFound, FailedPrecondition: there is no such deployment, or it is being deleted.
            DumontError: the start failed in its last tier; the message tells of the others.
        """
        arrived = self._clock.moment().steady
        if (ready := self._launcher.resident(deployment)) is not None:
            return self._lease(ready, None, arrived, why)
        self._waiting[deployment] += 1
        try:
            for _ in range(TRIES):
                started = await self._join(deployment, arrived)
                if (ready := self._launcher.resident(deployment)) is not None:
                    return self._lease(ready, started, arrived, why)
            raise Unavailable(
                "INSTANCE_LOST",
                f"instances of deployments/{deployment} ended as soon as they served; see their logs",
                metadata={"deployment": f"deployments/{deployment}"},
                retry_after=1.0,
            )
        finally:
            self._waiting[deployment] -= 1
            if not self._waiting[deployment]:
                del self._waiting[deployment]
                self._inventory.notify()

    def _lease(
        self, ready: policy.Start, started: Started | None, arrived: float, why: tuple[str, ...]
    ) -> Lease:
        instance = self._inventory.instances[ready.instance]
        self._inventory.lease(instance.id)
        self._catalogue.used(instance.deployment)
        total = self._clock.moment().steady - arrived
        if started is None:
            started = Started(Tier.RESIDENT, (ready.reason,), (Phase("decide", total),))
        info = StartInfo(
            started.tier, why + started.reasons, started.phases, total, instance.id, instance.node
        )

        def release() -> None:
            self._inventory.release(instance.id)
            if instance.deployment in self._catalogue.deployments:
                self._catalogue.used(instance.deployment)

        return Lease(info, release)

    async def _join(self, deployment: str, arrived: float) -> Started | None:
        """Wait for what runs, or begin a start. None when there is no start to tell of."""
        run = self._runs.get(deployment)
        if run is not None and deployment in self._capturing:
            await asyncio.wait([run])
            return None
        joined = run is not None
        if run is None:
            run = self._begin(deployment, lambda: self._start(deployment))
        try:
            # Shielded: a caller who leaves does not take the start away from the others.
            started: Started = await asyncio.shield(run)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if run.cancelled() and not (task and task.cancelling()):
                return None
            raise
        if not joined:
            return started
        # The steps of a start that began before this request would add up to more than it waited.
        waited = Phase("queue", self._clock.moment().steady - arrived)
        return replace(started, phases=(waited,), reasons=("joined a start under way", *started.reasons))

    async def start(self, deployment: str) -> None:
        """Bring an instance up for nobody in particular; joins a start under way."""
        if self._launcher.resident(deployment) is None:
            await self._join(deployment, self._clock.moment().steady)

    def begin(self, deployment: str) -> None:
        """Like ``start``, without waiting; a failure shows in the deployment's state."""
        if deployment not in self._runs:
            self._begin(deployment, lambda: self._start(deployment))

    async def cancel(self, deployment: str) -> None:
        """End the deployment's start, on the node as well, and wait until it has."""
        run = self._runs.get(deployment)
        if run is not None:
            run.cancel()
            await asyncio.wait([run])

    async def lost(self, instance: str, error: DumontError) -> str:
        """A serving instance did not answer: see what is left of it. Returns the reason to tell."""
        known = self._inventory.instances.get(instance)
        if known is not None and error.reason == NODE_UNAVAILABLE:
            self._fleet.recheck(known.node)
        elif known is not None:
            await self._commands.refresh(instance)
            if error.reason not in PASSING and self._serves(instance):
                log.warning("instance_lost", instance=instance, reason=error.reason)
                self._tasks.spawn(self._commands.stop(instance, force=True), f"stop {instance}")
                # One turn of the loop, in which it leaves the state that requests are routed to.
                await asyncio.sleep(0)
        return f"instances/{instance} did not answer: {error.reason}: {error.message}"

    def _serves(self, instance: str) -> bool:
        known = self._inventory.instances.get(instance)
        return known is not None and known.state is InstanceState.SERVING and not known.busy

    # One start

    def _begin(self, deployment: str, work: Callable[[], Awaitable[Any]]) -> asyncio.Task[Any]:
        run = self._tasks.spawn(self._guard(deployment, work), f"start {deployment}")
        self._runs[deployment] = run
        # Not in the work's own ``finally``: a task cancelled before its first step never gets there.
        run.add_done_callback(lambda _: self._ended(deployment))
        return run

    def _ended(self, deployment: str) -> None:
        del self._runs[deployment]
        self._capturing.discard(deployment)
        self._inventory.notify()

    async def _guard(self, deployment: str, work: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await work()
        except (DumontError, asyncio.CancelledError):
            raise
        except Exception as error:
            log.exception("start_failed", deployment=deployment)
            raise Internal("INTERNAL", "the start failed by a defect; see the controller's log") from error

    async def _start(self, deployment: str) -> Started:
        try:
            started = await self._launcher.start(deployment)
        except DumontError as error:
            self.failures[deployment] = f"{error.reason}: {error.message}"
            raise
        self.failures.pop(deployment, None)
        return started

    # Snapshots on request

    def check_captured(self, deployment: str) -> None:
        """Raise unless snapshots of a deployment may be made.

        Raises:
            NotFound: there is no such deployment.
            FailedPrecondition: CHECKPOINT_DISABLED or DEPLOYMENT_DELETING.
        """
        if not self._catalogue.get_active(deployment).checkpoint.enabled:
            raise FailedPrecondition(
                "CHECKPOINT_DISABLED",
                f"deployments/{deployment} has checkpointing disabled; set deployment.checkpoint.enabled",
                field="deployment",
                metadata={"deployment": f"deployments/{deployment}"},
            )

    async def snapshot(self, deployment: str, snapshot: str, told: Told) -> Snapshot:
        """Capture as ``Launcher.snapshot`` does, after the start under way if there is one.

        Raises:
            FailedPrecondition: CHECKPOINT_DISABLED.
            DumontError: the start or the capture failed.
        """
        while (run := self._runs.get(deployment)) is not None:
            await asyncio.wait([run])
        self.check_captured(deployment)
        run = self._begin(deployment, lambda: self._launcher.snapshot(deployment, snapshot, told))
        self._capturing.add(deployment)
        made: Snapshot = await run
        return made

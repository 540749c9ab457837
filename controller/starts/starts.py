"""Starts are shared: a deployment has one at a time, and every request for it waits for that one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import structlog

from controller import policy
from controller.backoff import Backoff
from controller.core import Core
from controller.instances import Instances
from controller.model import Deployment, DeploymentState, InstanceState, Phase, Snapshot, StartInfo, Tier
from controller.starts.start import OnStage, Start, Started
from dumont.errors import DumontError, FailedPrecondition, Internal, Unavailable

log = structlog.get_logger()

# How often a request waits for an instance that is gone again before the request can enter it.
ATTEMPTS = 3
FAST = frozenset({InstanceState.SERVING, InstanceState.PARKED})


class Lease:
    """A request's hold on an instance: it is neither parked nor stopped until ``release``."""

    def __init__(self, info: StartInfo, release: Callable[[], None]) -> None:
        self.info = info
        self._release = release

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()


@dataclass(frozen=True, slots=True)
class _Run:
    """A start or a capture under way."""

    task: asyncio.Task[Any]
    captures: bool


class Starts:
    """Whoever asks while a start runs waits for it, and whoever leaves does not end it."""

    def __init__(self, core: Core, instances: Instances) -> None:
        self._core = core
        self._instances = instances
        self._captures = Backoff(first=30.0, limit=3600.0)
        self._runs: dict[str, _Run] = {}
        self._waiting: Counter[str] = Counter()
        # The error of the last start by deployment, if it failed.
        self.failures: dict[str, str] = {}

    @property
    def starting(self) -> frozenset[str]:
        """Deployments that a start runs for or a request waits for."""
        return frozenset(self._runs) | frozenset(self._waiting)

    def condition(self, deployment: Deployment) -> tuple[DeploymentState, str]:
        """A deployment's state, and the reason when it is not ACTIVE."""
        if deployment.deleting:
            return DeploymentState.DELETING, "its instances and snapshots are being removed"
        if deployment.id in self.failures:
            return DeploymentState.DEGRADED, f"its last start failed: {self.failures[deployment.id]}"
        fast = self._core.inventory.snapshots_of(deployment.id) or any(
            i.state in FAST for i in self._core.inventory.instances_of(deployment.id)
        )
        if deployment.id in self._runs and not fast:
            return DeploymentState.CREATING, "it is being started"
        return DeploymentState.ACTIVE, ""

    # Requests

    async def acquire(self, deployment: str, reasons: tuple[str, ...] = ()) -> Lease:
        """Wait for an instance that serves, started if need be, and hold it.

        Args:
            deployment: its id.
            reasons: reported ahead of the start's own.

        Raises:
            NotFound, FailedPrecondition: there is no such deployment, or it is being deleted.
            DumontError: the start failed in its last tier; the message tells of the others.
        """
        arrived = self._core.now()
        start = self._new(deployment)
        if (ready := start.resident()) is not None:
            return self._lease(ready, None, arrived, reasons)
        self._waiting[deployment] += 1
        try:
            for _ in range(ATTEMPTS):
                started = await self._join(start, arrived)
                start = self._new(deployment)
                if (ready := start.resident()) is not None:
                    return self._lease(ready, started, arrived, reasons)
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
                self._core.inventory.notify()

    def _lease(
        self, ready: policy.Attempt, started: Started | None, arrived: float, reasons: tuple[str, ...]
    ) -> Lease:
        inventory, deployments = self._core.inventory, self._core.deployments
        instance = inventory.instances[ready.instance]
        inventory.lease(instance.id)
        deployments.used(instance.deployment)
        total = self._core.now() - arrived
        if started is None:
            started = Started(Tier.RESIDENT, (ready.reason,), (Phase("decide", total),))
        info = StartInfo(
            started.tier, reasons + started.reasons, started.phases, total, instance.id, instance.node
        )

        def release() -> None:
            inventory.release(instance.id)
            if instance.deployment in deployments.by_id:
                deployments.used(instance.deployment)

        return Lease(info, release)

    # Runs

    def _new(self, deployment: str) -> Start:
        return Start(deployment, self._core, self._instances, self._captures)

    async def _join(self, start: Start, arrived: float) -> Started | None:
        """Wait for the run under way, or else run ``start``. None when there is no start to report."""
        run = self._runs.get(start.deployment)
        joined = run is not None
        if run is None:
            run = self._begin(start, lambda: self._run(start))
        elif run.captures:
            await asyncio.wait([run.task])
            return None
        try:
            # Shielded: a caller who leaves does not take the start away from the others.
            started: Started = await asyncio.shield(run.task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if run.task.cancelled() and not (caller and caller.cancelling()):
                return None
            raise
        if not joined:
            return started
        # The steps of a start that began before this request would add up to more than it waited.
        queued = Phase("queue", self._core.now() - arrived)
        return replace(started, phases=(queued,), reasons=("joined a start under way", *started.reasons))

    async def start(self, deployment: str) -> None:
        """Bring an instance up without a request for it; joins a start under way."""
        start = self._new(deployment)
        if start.resident() is None:
            await self._join(start, self._core.now())

    def begin(self, deployment: str) -> None:
        """Like ``start``, without waiting; a failure shows in the deployment's state."""
        if deployment not in self._runs:
            start = self._new(deployment)
            self._begin(start, lambda: self._run(start))

    async def cancel(self, deployment: str) -> None:
        """End the deployment's start, on the node as well, and wait until it has ended."""
        run = self._runs.get(deployment)
        if run is not None:
            run.task.cancel()
            await asyncio.wait([run.task])

    def _begin(self, start: Start, work: Callable[[], Awaitable[Any]], captures: bool = False) -> _Run:
        deployment = start.deployment
        task = self._core.tasks.spawn(self._guard(deployment, work), f"start {deployment}")
        run = self._runs[deployment] = _Run(task, captures)
        # Not in the work's own ``finally``: a task cancelled before its first step never gets there.
        task.add_done_callback(lambda _: self._ended(deployment))
        return run

    def _ended(self, deployment: str) -> None:
        del self._runs[deployment]
        self._core.inventory.notify()

    async def _guard(self, deployment: str, work: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await work()
        except (DumontError, asyncio.CancelledError):
            raise
        except Exception as error:
            log.exception("start_crashed", deployment=deployment)
            raise Internal(
                "INTERNAL", "the start failed because of a defect; see the controller's log"
            ) from error

    async def _run(self, start: Start) -> Started:
        try:
            started = await start.run()
        except DumontError as error:
            self.failures[start.deployment] = f"{error.reason}: {error.message}"
            raise
        self.failures.pop(start.deployment, None)
        return started

    # Snapshots on request

    def check_capturable(self, deployment: str) -> None:
        """Raise unless snapshots of a deployment may be made.

        Raises:
            NotFound: there is no such deployment.
            FailedPrecondition: CHECKPOINT_DISABLED or DEPLOYMENT_DELETING.
        """
        if not self._core.deployments.get_active(deployment).checkpoint.enabled:
            raise FailedPrecondition(
                "CHECKPOINT_DISABLED",
                f"deployments/{deployment} has checkpointing disabled; set deployment.checkpoint.enabled",
                field="deployment",
                metadata={"deployment": f"deployments/{deployment}"},
            )

    async def capture(self, deployment: str, snapshot: str, on_stage: OnStage) -> Snapshot:
        """Capture as ``Start.capture`` does, after the run under way if there is one.

        Raises:
            FailedPrecondition: CHECKPOINT_DISABLED.
            DumontError: the start or the capture failed.
        """
        while (run := self._runs.get(deployment)) is not None:
            await asyncio.wait([run.task])
        self.check_capturable(deployment)
        start = self._new(deployment)
        run = self._begin(start, lambda: start.capture(snapshot, on_stage), captures=True)
        captured: Snapshot = await run.task
        return captured

"""The only loop: whenever facts change or something falls due, plan and carry the plan out."""

from __future__ import annotations

import asyncio
from typing import assert_never

import structlog

from controller import expiry
from controller.backoff import Backoff
from controller.core import Core
from controller.expiry import DeleteSnapshot, Forget, GiveUp, KeepWarm, Park, Publish, Stop
from controller.instances import Instances
from controller.ports import NODE_UNAVAILABLE
from controller.snapshots import Snapshots
from controller.starts.starts import Starts
from dumont.errors import DumontError

log = structlog.get_logger()

STEADY_ENOUGH = 60.0
# A park that failed with these says nothing about whether the instance can be parked.
TRANSIENT = frozenset({"INSTANCE_BUSY", "ILLEGAL_TRANSITION", "INSTANCE_NOT_FOUND", NODE_UNAVAILABLE})


class Reconciler:
    """Makes what is true into what should be.

    Args:
        silence: seconds without a heartbeat after which a node is given up.
        save_every: seconds between two savings of last-use times; a crash loses at most these.
    """

    def __init__(
        self,
        core: Core,
        starts: Starts,
        instances: Instances,
        snapshots: Snapshots,
        silence: float = 15.0,
        save_every: float = 2.0,
    ) -> None:
        self._core = core
        self._starts = starts
        self._instances = instances
        self._snapshots = snapshots
        self._silence = silence
        self._save_every = save_every
        self._under_way: set[str] = set()
        self._backoff = Backoff(first=1.0, limit=60.0)
        self._restarts = Backoff(first=1.0, limit=60.0)
        self._defects = Backoff(first=1.0, limit=60.0)
        self._warmed: dict[str, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        self._core.tasks.spawn(self._save_last_use(), "save last use")
        while True:
            changed = self._core.inventory.changed
            try:
                wake_in = self.step()
            except Exception:
                # One defect must not end every timer: try again, later each time.
                log.exception("reconcile_failed")
                self._core.metrics.reconciler_errors.inc()
                self._defects.failed("step", self._core.now())
                await self._core.clock.sleep(self._defects.at["step"] - self._core.now())
            else:
                self._defects.succeeded("step")
                await self._sleep(changed, wake_in)

    def step(self) -> float | None:
        """Plan once, begin what is due, and return the seconds until more may be."""
        now = self._core.clock.moment()
        plan = expiry.plan(self.facts(), now)
        for action in plan.actions:
            self._under_way.add(action.target)
            self._core.tasks.spawn(self._carry_out(action), f"{type(action).__name__} {action.target}")
        return plan.wake_in

    def facts(self) -> expiry.Facts:
        """Everything the plan is made from; targets being acted on are put off."""
        busy = dict.fromkeys(self._under_way, float("inf"))
        return expiry.Facts(
            deployments=dict(self._core.deployments.by_id),
            instances=tuple(self._core.inventory.instances.values()),
            snapshots=tuple(self._core.inventory.snapshots.values()),
            nodes=dict(self._core.inventory.nodes),
            last_use=self._core.deployments.last_use,
            starting=self._starts.starting,
            retry_at=self._backoff.at | self._restarts.at | busy,
            silence=self._silence,
        )

    async def _sleep(self, changed: asyncio.Event, wake_in: float | None) -> None:
        if wake_in is None or wake_in == float("inf"):
            await changed.wait()
            return
        waits = [
            asyncio.ensure_future(changed.wait()),
            asyncio.ensure_future(self._core.clock.sleep(wake_in)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _carry_out(self, action: expiry.Action) -> None:
        kind = type(action).__name__
        try:
            await self._do(action)
        except DumontError as error:
            log.warning("action_failed", action=kind, target=action.target, reason=error.reason)
            self._core.metrics.actions.labels(kind, "failed").inc()
            if isinstance(action, Park) and error.reason not in TRANSIENT:
                self._core.inventory.refuse_parking(action.instance)
            self._backoff.failed(action.target, self._core.now())
        except Exception:
            log.exception("action_crashed", action=kind, target=action.target)
            self._core.metrics.actions.labels(kind, "crashed").inc()
            self._backoff.failed(action.target, self._core.now())
        else:
            log.info("action_done", action=kind, target=action.target, because=action.reason)
            self._core.metrics.actions.labels(kind, "ok").inc()
            self._backoff.succeeded(action.target)
        finally:
            self._under_way.discard(action.target)
            self._core.inventory.notify()

    async def _do(self, action: expiry.Action) -> None:
        match action:
            case Park():
                await self._instances.park(action.instance)
            case Stop():
                await self._instances.stop(action.instance)
            case DeleteSnapshot():
                await self._snapshots.delete(action.snapshot)
            case Publish():
                await self._snapshots.publish(action.snapshot)
            case KeepWarm():
                await self._keep_warm(action.deployment)
            case Forget():
                await self._core.deployments.forget(action.deployment)
                self._starts.failures.pop(action.deployment, None)
            case GiveUp():
                await self._core.fleet.give_up(action.node)
            case _:
                assert_never(action)

    async def _keep_warm(self, deployment: str) -> None:
        # One that ends soon after each start must wait longer each time, though every start succeeds.
        key = KeepWarm(deployment, "").target
        now = self._core.now()
        if now - self._warmed.get(deployment, now) > STEADY_ENOUGH:
            self._restarts.succeeded(key)
        self._restarts.failed(key, now)
        await self._starts.start(deployment)
        self._warmed[deployment] = self._core.now()

    async def _save_last_use(self) -> None:
        while True:
            await self._core.clock.sleep(self._save_every)
            try:
                await self._core.deployments.save_last_use()
            except DumontError as error:
                log.warning("save_last_use_failed", reason=error.reason, message=error.message)
            except Exception:
                log.exception("save_last_use_crashed")

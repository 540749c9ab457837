"""From a request to an instance that serves.

Requests that cannot be answered yet wait in order of arrival. A deployment has one start at a time, and all
requests for it share that start.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import structlog

from controller import policy, room
from controller.backoff import Backoff
from controller.core import Core
from controller.estimates import WORK_OF, Work
from controller.instances import Instances
from controller.model import (
    Deployment,
    DeploymentState,
    Instance,
    InstanceState,
    Phase,
    Snapshot,
    StartInfo,
    StartMode,
    Tier,
)
from controller.queue import DEFAULT_LENGTH, Queue, Ticket
from controller.room import Tenant
from controller.starts.start import OnStage, Start, Started
from dumont.errors import (
    DeadlineExceeded,
    DumontError,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    Unavailable,
)

log = structlog.get_logger()

# A request gives up after so many starts whose instance was gone before the request could enter it.
ATTEMPTS = 3
T = TypeVar("T")
FAST = frozenset({InstanceState.SERVING, InstanceState.PARKED})


class Lease:
    """A request's hold on an instance: it is neither parked nor stopped until ``release``."""

    def __init__(self, info: StartInfo, release: Callable[[], None]) -> None:
        self.info = info
        self.release = release

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class _Run:
    """A start or a capture under way."""

    task: asyncio.Task[Any]
    start: Start
    captures: bool


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request in the queue, and what is known of the start that it waited for."""

    admitted: asyncio.Future[Lease]
    reasons: tuple[str, ...]
    started: Started | None = None
    starts: int = 0
    full: str = ""


class _Waiters:
    """The requests that wait for one deployment. ``queue`` has their order.

    ``run`` is the start that they wait for, and ``beginner`` the request that it was begun for.
    """

    def __init__(self, deployment: str, length: int) -> None:
        self.queue = Queue(deployment, length)
        self.waiting: dict[Ticket, _Waiting] = {}
        self.run: _Run | None = None
        self.beginner: Ticket | None = None

    def leave(self, ticket: Ticket) -> _Waiting | None:
        self.queue.leave(ticket)
        return self.waiting.pop(ticket, None)

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        waiting = self.leave(ticket)
        if waiting is not None and not waiting.admitted.done():
            waiting.admitted.set_exception(error)

    def fail_all(self, error: BaseException) -> None:
        for ticket in self.queue.tickets:
            self.fail(ticket, error)

    def settle(self) -> None:
        """The start has ended: pass its outcome to the requests that waited for it."""
        assert self.run is not None
        run, beginner = self.run, self.beginner
        self.run = self.beginner = None
        if run.captures:
            return
        if not run.task.cancelled() and (error := run.task.exception()) is not None:
            self.fail_all(error)
            return
        started: Started | None = None if run.task.cancelled() else run.task.result()
        for ticket, waiting in self.waiting.items():
            waiting.starts += 1
            waiting.started = started
            if started is not None and ticket != beginner:
                reasons = ("joined a start under way", *started.reasons)
                waiting.started = Started(started.tier, reasons, ())


class Starts:
    """Requests that arrive while a start runs wait for it; a request that leaves does not end it.

    Args:
        core: the ports and the facts.
        instances: the commands to instances.
        max_waiting: requests that may wait for one deployment.
    """

    def __init__(self, core: Core, instances: Instances, max_waiting: int = DEFAULT_LENGTH) -> None:
        self._core = core
        self._instances = instances
        self._max_waiting = max_waiting
        self._captures = Backoff(first=30.0, limit=3600.0)
        self._ruled_out = Backoff(first=10.0, limit=300.0)
        self._runs: dict[str, _Run] = {}
        # Starts of another instance beside those that serve. No request waits for their end.
        self._others: dict[str, _Run] = {}
        # Since when every instance of a deployment has been nearly full.
        self._loaded_since: dict[str, float] = {}
        self._another = Backoff(first=5.0, limit=300.0)
        self._waiters: dict[str, _Waiters] = {}
        # The error of the last start by deployment, if it failed.
        self.failures: dict[str, str] = {}

    def starting(self, deployment: str) -> bool:
        """Whether a start runs for a deployment, or a request waits for it."""
        return deployment in self._runs or deployment in self._waiters or deployment in self._others

    def waiting(self, deployment: str) -> int:
        """How many requests wait for an instance of a deployment."""
        return len(waiters.queue) if (waiters := self._waiters.get(deployment)) else 0

    def condition(self, deployment: Deployment) -> tuple[DeploymentState, str]:
        """A deployment's state, and the reason when it is not ACTIVE."""
        if deployment.deleting:
            return DeploymentState.DELETING, "its instances and snapshots are being removed"
        if deployment.id in self.failures:
            return DeploymentState.DEGRADED, f"its last start failed: {self.failures[deployment.id]}"
        fast = any(
            s.owner == deployment.uid for s in self._core.inventory.snapshots_of(deployment.id)
        ) or any(i.state in FAST for i in self._core.inventory.instances_of(deployment.id))
        if deployment.id in self._runs and not fast:
            return DeploymentState.CREATING, "it is being started"
        return DeploymentState.ACTIVE, ""

    # Requests

    def ticket(self, deadline: float | None = None, sequences: int = 1, size: int = 0) -> Ticket:
        """A ticket for a request that arrives now.

        Args:
            deadline: monotonic time after which the caller no longer waits; None: it waits for ever.
            sequences: answers that it asks for.
            size: in bytes.
        """
        return Ticket(self._core.now(), deadline, sequences, size)

    async def acquire(
        self, deployment: str, reasons: tuple[str, ...] = (), ticket: Ticket | None = None
    ) -> Lease:
        """Wait for an instance that serves and has room, started if need be, and hold it.

        Args:
            deployment: its id.
            reasons: reported ahead of the start's own.
            ticket: the request's place in the queue; None: it arrives now and takes one sequence.

        Raises:
            NotFound, FailedPrecondition: there is no such deployment, or it is being deleted.
            ResourceExhausted: QUEUE_FULL.
            DeadlineExceeded: the ticket's deadline passed.
            DumontError: the start failed in its last tier; the message lists the other failures.
        """
        ticket = ticket or self.ticket()
        if deployment not in self._waiters:
            ready = self._new(deployment).admit(ticket.sequences)
            if isinstance(ready, policy.Attempt):
                lease = self._lease(ready, ticket, _Waiting(_future(), reasons))
                self._start_another(deployment, None)
                return lease
        waiters = self._waiters_of(deployment)
        waiters.queue.enter(ticket)
        waiting = waiters.waiting[ticket] = _Waiting(_future(), reasons)
        try:
            return await _taken(waiting.admitted)
        finally:
            waiters.leave(ticket)
            if not waiters.queue:
                # The task that admits requests ends when none is left.
                self._core.inventory.touch(f"deployments/{deployment}")

    def _lease(self, ready: policy.Attempt, ticket: Ticket, waiting: _Waiting) -> Lease:
        inventory, deployments = self._core.inventory, self._core.deployments
        instance = inventory.instances[ready.instance]
        inventory.lease(instance.id, ticket.sequences)
        deployments.used(instance.deployment)
        total = self._core.now() - ticket.arrived
        started = waiting.started
        if started is None:
            name = "queue" if waiting.full else "decide"
            reasons = tuple(filter(None, (waiting.full, ready.reason)))
            started = Started(Tier.RESIDENT, reasons, (Phase(name, total),))
        elif not started.phases:
            # The request joined a start, whose steps would add up to more than the request waited.
            started = replace(started, phases=(Phase("queue", total),))
        info = StartInfo(
            started.tier, waiting.reasons + started.reasons, started.phases, total, instance.id, instance.node
        )

        released = False

        def release() -> None:
            # An answer that is not read releases its instance before it ends.
            nonlocal released
            if released:
                return
            released = True
            inventory.release(instance.id, ticket.sequences)
            if instance.deployment in self._loaded_since and not self._loaded(instance.deployment):
                del self._loaded_since[instance.deployment]
            if instance.deployment in deployments.by_id:
                deployments.used(instance.deployment)
            if (waiters := self._waiters.get(instance.deployment)) is not None:
                self._admit(instance.deployment, waiters)

        return Lease(info, release)

    # The queue

    def _waiters_of(self, deployment: str) -> _Waiters:
        if (waiters := self._waiters.get(deployment)) is None:
            waiters = _Waiters(deployment, self._max_waiting)
            self._core.tasks.spawn(self._attend(deployment, waiters), f"admit to {deployment}")
            self._waiters[deployment] = waiters
        return waiters

    async def _attend(self, deployment: str, waiters: _Waiters) -> None:
        """While requests wait: admit them in order, and start an instance if there is none."""
        try:
            with self._core.inventory.watched(f"deployments/{deployment}") as changed:
                while waiters.queue:
                    changed.clear()
                    if waiters.run is not None and waiters.run.task.done():
                        waiters.settle()
                    self._expire(deployment, waiters)
                    if self._admit(deployment, waiters):
                        self._wait_for_start(deployment, waiters)
                    elif (head := waiters.queue.head) is not None:
                        self._start_another(deployment, head.arrived)
                    if waiters.queue:
                        await self._next(deployment, changed, waiters)
        except DumontError as error:
            waiters.fail_all(error)
        except asyncio.CancelledError:
            waiters.fail_all(
                Unavailable(
                    "SERVICE_STOPPING", "the service is stopping; try again in a moment", retry_after=1.0
                )
            )
            raise
        except Exception:
            log.exception("queue_failed", deployment=deployment)
            waiters.fail_all(
                Internal("INTERNAL", "the request failed because of a defect; see the controller's log")
            )
        finally:
            del self._waiters[deployment]
            for run in (self._runs.get(deployment), self._others.get(deployment)):
                if run is not None and run.start.waits_for_room:
                    # Nobody waits for it any more, so nobody needs to make room.
                    run.task.cancel()
            # No request waits any more, so an idle instance may be due.
            self._core.inventory.touch(f"deployments/{deployment}")

    def _admit(self, deployment: str, waiters: _Waiters) -> bool:
        """Admit requests in order while there is room. True: the next one needs another instance."""
        # An instance may serve before its start ends. Requests are admitted then, with the start's outcome.
        while waiters.run is None and (ticket := waiters.queue.head) is not None:
            waiting = waiters.waiting[ticket]
            if waiting.admitted.done():
                waiters.leave(ticket)
                continue
            ready = self._new(deployment).admit(ticket.sequences)
            if ready is None:
                return True
            if isinstance(ready, policy.Full):
                waiting.full = ready.reason
                return False
            waiters.leave(ticket)
            waiting.admitted.set_result(self._lease(ready, ticket, waiting))
        return False

    def _wait_for_start(self, deployment: str, waiters: _Waiters) -> None:
        """Join the start under way or begin one. Refuse requests that have waited for several in vain."""
        waiters.run = self._runs.get(deployment)
        if waiters.run is not None:
            return
        for ticket, waiting in list(waiters.waiting.items()):
            if waiting.starts >= ATTEMPTS:
                lost = Unavailable(
                    "INSTANCE_LOST",
                    f"instances of deployments/{deployment} ended as soon as they served; see their logs",
                    metadata={"deployment": f"deployments/{deployment}"},
                    retry_after=1.0,
                )
                waiters.fail(ticket, lost)
        waiters.beginner = waiters.queue.head
        if waiters.beginner is not None:
            start = self._new(deployment)
            waiters.run = self._begin(start, partial(self._run, start))

    def _expire(self, deployment: str, waiters: _Waiters) -> None:
        for ticket in waiters.queue.expired(self._core.now()):
            message = (
                f"the caller's deadline passed while it waited for an instance of deployments/{deployment}"
            )
            waiters.fail(ticket, DeadlineExceeded("DEADLINE_EXCEEDED", message))

    async def _next(self, deployment: str, changed: asyncio.Event, waiters: _Waiters) -> None:
        """Wait until facts change, the start ends or the next deadline passes."""
        waits: set[asyncio.Future[Any]] = {asyncio.ensure_future(changed.wait())}
        times = [waiters.queue.next_deadline]
        if (head := waiters.queue.head) is not None and waiters.waiting[head].full:
            # Then another instance may be started for it.
            instances = self._core.inventory.instances_of(deployment)
            began = max((i.since for i in instances if i.state is InstanceState.SERVING), default=0.0)
            times.append(max(head.arrived, began) + policy.QUEUE_SECONDS)
        now = self._core.now()
        if due := [time for time in times if time is not None and time > now]:
            waits.add(asyncio.ensure_future(self._core.clock.sleep(min(due) - now)))
        elif times[0] is not None:
            waits.add(asyncio.ensure_future(self._core.clock.sleep(0.0)))
        try:
            run = {waiters.run.task} if waiters.run else set()
            await asyncio.wait(waits | run, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    # Runs

    def _new(self, deployment: str, another: bool = False) -> Start:
        return Start(
            deployment,
            self._core,
            self._instances,
            self._captures,
            self._ruled_out,
            self.tenants,
            another,
        )

    # Telling

    def explain(self, deployment: str) -> tuple[str, list[policy.Candidate]]:
        """What a request that arrived now would do, and every possible start.

        Raises:
            NotFound, FailedPrecondition: there is no such deployment, or it is being deleted.
        """
        return self._new(deployment).explain()

    def reasons(self, instance: Instance) -> tuple[str, ...]:
        """Why an instance is where it is, to whom it yields, and how long its return would take."""
        made = self._core.inventory.reasons.get(instance.id, ())
        return (*made, *room.standing(self._tenant(instance), self._core.now()))

    # Room

    def tenants(self, node: str) -> list[Tenant]:
        """The instances that take memory of a node, with what is known about their yielding it."""
        return [self._tenant(instance) for instance in self._core.inventory.instances_on(node)]

    def _tenant(self, instance: Instance) -> Tenant:
        inventory, estimates = self._core.inventory, self._core.inventory.estimates
        deployment, node = self._core.deployments.by_id.get(instance.deployment), instance.node
        mine = deployment is not None and self._core.membership.mine(deployment.id)
        if deployment is None or not mine or instance.id not in inventory.intents:
            # Nobody here knows what it is for, or whether somebody uses it.
            return Tenant(instance, ours=False)
        copy = inventory.copy_on(node, deployment.id)
        if copy is None or deployment.start_mode is not StartMode.CHECKPOINT:
            tier, size = Tier.COLD, deployment.weights_bytes
        else:
            tier, size = (Tier.LOCAL if copy.local else Tier.REMOTE), copy.size_bytes
        gpu_bytes = instance.report.gpu_bytes
        return Tenant(
            instance,
            priority=deployment.priority,
            kept=self._kept(deployment),
            wanted=self.starting(deployment.id),
            resume_seconds=estimates.seconds(deployment.id, node, Work.RESUME, gpu_bytes),
            back_seconds=sum(estimates.seconds(deployment.id, node, work, size) for work in WORK_OF[tier]),
            park_seconds=estimates.seconds(deployment.id, node, Work.PARK, gpu_bytes),
            stop_seconds=estimates.seconds(deployment.id, node, Work.STOP),
            parked_bytes=estimates.size(deployment.id).parked_bytes,
        )

    def _kept(self, deployment: Deployment) -> bool:
        """Whether none of a deployment's instances can be spared without a request for another one."""
        if not deployment.kept_instances:
            return False
        instances = self._core.inventory.instances_of(deployment.id)
        serving = sum(instance.state is InstanceState.SERVING for instance in instances)
        return serving <= deployment.kept_instances

    def _start_another(self, deployment: str, arrived: float | None) -> None:
        """Start another instance beside those that serve, if that is wanted and none is being started."""
        known = self._core.deployments.by_id[deployment]
        if known.most_instances == 1 or deployment in self._others or deployment in self._runs:
            return
        if self._another.at.get(deployment, 0.0) > self._core.now():
            return
        start = self._new(deployment, another=True)
        since = None
        if self._loaded(deployment):
            since = self._loaded_since.setdefault(deployment, self._core.now())
        if reason := start.wants_another(arrived, since):
            log.info("starts_another", deployment=deployment, because=reason)
            self._begin_another(start)

    def _loaded(self, deployment: str) -> bool:
        """Whether every instance of a deployment that serves is nearly full."""
        instances = self._core.inventory.instances_of(deployment)
        return policy.loaded(i for i in instances if i.state is InstanceState.SERVING and not i.busy)

    def _begin_another(self, start: Start) -> _Run:
        deployment = start.deployment
        work = self._guard(deployment, start.run)
        task = self._core.tasks.spawn(work, f"start another {deployment}")
        run = self._others[deployment] = _Run(task, start, captures=False)

        def ended(task: asyncio.Task[Any]) -> None:
            del self._others[deployment]
            if task.cancelled() or task.exception() is not None:
                self._another.failed(deployment, self._core.now())
            else:
                self._another.succeeded(deployment)
            self._core.inventory.touch(f"deployments/{deployment}")

        task.add_done_callback(ended)
        return run

    async def keep(self, deployment: str) -> None:
        """Start an instance without a request for it, beside those that serve.

        Raises:
            DumontError: the start failed.
        """
        if self._new(deployment).resident() is None:
            await self.start(deployment)
        elif deployment not in self._others:
            run = self._begin_another(self._new(deployment, another=True))
            await asyncio.wait([run.task])
            if not run.task.cancelled() and (error := run.task.exception()) is not None:
                raise error

    async def start(self, deployment: str) -> None:
        """Start an instance without a request for it; joins a start under way.

        Raises:
            DumontError: the start failed.
        """
        start = self._new(deployment)
        if start.resident() is not None:
            return
        run = self._runs.get(deployment) or self._begin(start, lambda: self._run(start))
        # Shielded: the start goes on for the others when its caller leaves.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(run.task)
            return
        caller = asyncio.current_task()
        if caller and caller.cancelling():
            raise asyncio.CancelledError

    def begin(self, deployment: str) -> None:
        """Like ``start``, without waiting; a failure shows in the deployment's state."""
        if deployment not in self._runs:
            start = self._new(deployment)
            self._begin(start, lambda: self._run(start))

    async def cancel(self, deployment: str) -> None:
        """End the deployment's start, on the node as well, and wait until it has ended."""
        for run in (self._runs.get(deployment), self._others.get(deployment)):
            if run is not None:
                run.task.cancel()
                await asyncio.wait([run.task])

    def _begin(self, start: Start, work: Callable[[], Awaitable[Any]], captures: bool = False) -> _Run:
        deployment = start.deployment
        task = self._core.tasks.spawn(self._guard(deployment, work), f"start {deployment}")
        run = self._runs[deployment] = _Run(task, start, captures)
        # Not in the work's own ``finally``: a task cancelled before its first step never gets there.
        task.add_done_callback(lambda _: self._ended(deployment))
        return run

    def _ended(self, deployment: str) -> None:
        del self._runs[deployment]
        self._core.inventory.touch(f"deployments/{deployment}")

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

        An instance that was started for it ends again, unless a request has come for it.

        Raises:
            FailedPrecondition: CHECKPOINT_DISABLED.
            DumontError: the start or the capture failed.
        """
        start: Start | None = None

        async def work() -> Snapshot:
            nonlocal start
            self.check_capturable(deployment)
            start = self._new(deployment)
            return await start.capture(snapshot, on_stage)

        try:
            return await self.alone(deployment, work)
        finally:
            if start is not None and start.made_to_capture:
                await self._end(deployment, start.made_to_capture)

    async def _end(self, deployment: str, instance: str) -> None:
        """End an instance that nothing needs. What asks for it meanwhile keeps it."""
        known = self._core.deployments.by_id.get(deployment)
        if known is None or known.kept_instances or self.waiting(deployment):
            return
        # It has served a request, or has ended already; or the whole service ends, which leaves it as it is.
        with contextlib.suppress(DumontError):
            task = self._core.tasks.spawn(self._instances.stop(instance), f"end {instance}")
            await asyncio.shield(task)

    # Migrations

    def at(self, deployment: str, node: str) -> policy.Attempt:
        """How another instance would be started on a node: from what, on which GPU, and who makes room.

        Raises:
            ResourceExhausted: NO_ROOM.
            Unavailable: NO_NODE, it takes no starts.
        """
        decision = self._new(deployment).at(node)
        if isinstance(decision, policy.Wait):
            raise ResourceExhausted(
                "NO_ROOM",
                f"nodes/{node} cannot take an instance of deployments/{deployment} now: {decision.reason}",
                metadata={"node": f"nodes/{node}", "deployment": f"deployments/{deployment}"},
                retry_after=1.0,
            )
        return decision

    async def alone(self, deployment: str, work: Callable[[], Awaitable[T]]) -> T:
        """Run ``work`` in place of a start: after the one under way, while no other begins.

        Cancelling this, or the deployment's start, cancels ``work``.

        Args:
            deployment: its id.
            work: makes or captures instances of the deployment.

        Raises:
            DumontError: what ``work`` raises.
        """
        while (run := self._runs.get(deployment)) is not None:
            await asyncio.wait([run.task])
        result: T = await self._begin(self._new(deployment), work, captures=True).task
        return result


def _future() -> asyncio.Future[Lease]:
    return asyncio.get_running_loop().create_future()


async def _taken(admitted: asyncio.Future[Lease]) -> Lease:
    """Wait for the lease; a caller that is cancelled as it is granted gives it back."""
    try:
        return await admitted
    except asyncio.CancelledError:
        if admitted.done() and not admitted.cancelled() and admitted.exception() is None:
            admitted.result().release()
        raise

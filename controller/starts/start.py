"""One start of a deployment, from its first decision to an instance that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from controller import policy
from controller.backoff import Backoff
from controller.core import Core
from controller.instances import Instances
from controller.inventory import Inventory
from controller.model import (
    Deployment,
    Instance,
    InstanceState,
    NodeState,
    Phase,
    Snapshot,
    Tier,
    total_seconds,
)
from controller.ports import NODE_UNAVAILABLE
from dumont import engines, names
from dumont.errors import ERRORS, DumontError, InvalidArgument, ResourceExhausted, Unavailable

log = structlog.get_logger()

# Reasons of a restore whose node holds something else than was captured.
DAMAGED_COPY = frozenset({"IMAGE_DAMAGED", "MANIFEST_DAMAGED"})
# Seconds for which a start waits for room before it fails, and after which it may be tried again then.
ROOM_SECONDS: Final = 60.0
ROOM_RETRY: Final = 5.0
# How often a start decides again because an instance did not make room.
ROOM_ATTEMPTS: Final = 5
# Nodes on which one start loads a model before it gives up.
COLD_ATTEMPTS = 3

# Called with an instance's id (empty while there is none) and the stage: "starting", "capturing".
OnStage = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Started:
    """How a start succeeded."""

    tier: Tier
    reasons: tuple[str, ...]
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True)
class _Copies:
    """A deployment's snapshots as each of many nodes sees them, which most requests need not know."""

    inventory: Inventory
    deployment: Deployment

    def __iter__(self) -> Iterator[Snapshot]:
        copies = self.inventory.copies_of(self.deployment.id)
        return (copy for copy in copies if copy.owner == self.deployment.uid)


class Start:
    """Attempts tier after tier, and records what was attempted, why, and how long each step took.

    A start does not know who waits for it. ``Starts`` makes sure that a deployment has one at a time.

    Args:
        deployment: the id of the deployment to start.
        core: the ports and the facts.
        instances: the commands to instances.
        captures: which deployments may be captured again, and when.
        ruled_out: on which nodes which deployments may be started again, and when.
        tenants: the instances of each node.
        another: start one beside those that serve.
    """

    def __init__(
        self,
        deployment: str,
        core: Core,
        instances: Instances,
        captures: Backoff,
        ruled_out: Backoff,
        tenants: policy.Tenants,
        another: bool = False,
    ) -> None:
        self.deployment = deployment
        # Whether no node has room for it now.
        self.waits_for_room = False
        self._core = core
        self._instances = instances
        self._captures = captures
        self._ruled_out = ruled_out
        self._tenants = tenants
        self._another = another
        self._room_until: float | None = None
        self._rooms_not_made = 0
        self._failed: set[str] = set()
        self._reasons: list[str] = []
        self._phases: list[Phase] = []
        self._joined: Tier | None = None
        self._rechecked = False
        # The instance that was started only to be captured, if one was.
        self.made_to_capture = ""

    def resident(self) -> policy.Attempt | None:
        """The instance that can answer now; None if there is none, or if it should be captured first.

        Raises:
            NotFound, FailedPrecondition: there is no such deployment, or it is being deleted.
        """
        facts = self._facts()
        if not any(i.state is InstanceState.SERVING for i in facts.instances):
            return None
        decision = policy.decide(facts, self._core.now())
        if isinstance(decision, policy.Attempt) and decision.tier is Tier.RESIDENT and not decision.capture:
            return decision
        return None

    def admit(self, sequences: int) -> policy.Attempt | policy.Full | None:
        """The instance that a request may enter now; see ``policy.admit``.

        Raises:
            NotFound, FailedPrecondition: there is no such deployment, or it is being deleted.
        """
        return policy.admit(self._facts(), self._core.now(), sequences)

    async def _create_to_capture(self) -> str:
        """Load the model beside whatever there is, on a node that can capture it."""
        while True:
            facts = self._facts()
            capable = {name: node for name, node in facts.nodes.items() if node.checkpoint_capable}
            facts = replace(facts, instances=(), snapshots=(), nodes=capable, another=True)
            decision = policy.decide(facts, self._core.now())
            if isinstance(decision, policy.Wait):
                await self._wait_for_room(decision)
                continue
            try:
                return await self._perform(replace(decision, capture=False))
            except DumontError as error:
                if not self._learns_of_room(decision, error):
                    raise

    def explain(self) -> tuple[str, list[policy.Candidate]]:
        """What this start would do now, and every possible one; see ``policy.explain``."""
        facts, now = self._facts(), self._core.now()
        try:
            decision = policy.decide(facts, now)
        except DumontError as error:
            words = f"it would be refused: {error.reason}: {error.message}"
        else:
            if isinstance(decision, policy.Wait):
                words = f"it would wait: {decision.reason}"
            else:
                words = f"{decision.tier.value} on nodes/{decision.node}: {decision.reason}"
        return words, policy.explain(facts, now)

    def wants_another(self, arrived: float | None, loaded_since: float | None) -> str:
        """Why another instance should be started; see ``policy.wants_another``."""
        return policy.wants_another(self._facts(), self._core.now(), arrived, loaded_since)

    def at(self, node: str) -> policy.Attempt | policy.Wait:
        """How another instance would be started on one node; see ``policy.decide``."""
        facts = self._facts()
        here = {node: facts.nodes[node]}
        return policy.decide(replace(facts, instances=(), nodes=here, another=True), self._core.now())

    async def run(self) -> Started:
        """Decide and act until an instance serves.

        Raises:
            DumontError: the last tier failed; the message lists the other failures.
        """
        while True:
            began = self._core.now()
            try:
                decision = policy.decide(self._facts(), began)
            except (Unavailable, ResourceExhausted) as error:
                raise _with_history(error, self._reasons) from None
            self._phase("decide", began)
            if isinstance(decision, policy.Wait):
                await (self._wait_for_room if decision.room else self._wait)(decision)
                continue
            self._reasons.append(decision.reason)
            began = self._core.now()
            try:
                instance = await self._perform(decision)
            except DumontError as error:
                self._phase(f"failed_{decision.tier.value}", began)
                self._fall_back(decision, error)
                continue
            if self._serves(instance):
                return self._succeeded(decision, instance)

    async def capture(self, snapshot: str, on_stage: OnStage) -> Snapshot:
        """Capture an instance that no prompt has entered; when there is none, start one for it.

        Args:
            snapshot: the new snapshot's id.
            on_stage: called at each stage.

        Raises:
            DumontError: the start or the capture failed.
        """
        deployment = self._known()
        candidates = (
            i
            for i in self._own_instances(deployment)
            if i.report.weights is deployment.checkpoint.weights and self._unused(i)
        )
        if (unused := next(candidates, None)) is not None:
            instance = unused.id
        else:
            on_stage("", "starting")
            instance = self.made_to_capture = await self._create_to_capture()
        on_stage(instance, "capturing")
        captured = await self._instances.capture(deployment, instance, snapshot)
        self._captures.succeeded(deployment.id)
        return captured

    # Deciding

    def _known(self) -> Deployment:
        return self._core.deployments.get_active(self.deployment)

    def _own_instances(self, deployment: Deployment) -> tuple[Instance, ...]:
        known = self._core.inventory.instances_of(deployment.id)
        return tuple(instance for instance in known if deployment.runs(instance.report))

    def _facts(self) -> policy.Facts:
        known = self._known()
        return policy.Facts(
            deployment=known,
            instances=self._own_instances(known),
            snapshots=_Copies(self._core.inventory, known),
            nodes=self._core.inventory.nodes,
            failed=frozenset(self._failed) | self._ruled_out_nodes(),
            capture_at=self._captures.at.get(self.deployment, 0.0),
            started_on=self._core.inventory.started_on(self.deployment),
            captured_on=self._core.inventory.captured_on(self.deployment),
            tenants=self._tenants,
            estimates=self._core.inventory.estimates,
            another=self._another,
        )

    def _ruled_out_nodes(self) -> frozenset[str]:
        """The nodes where this deployment failed to start a while ago, unless no other is left."""
        now, at = self._core.now(), self._ruled_out.at
        if not at:
            return frozenset()
        ready = [node.id for node in self._core.inventory.nodes.values() if node.takes_starts]
        out = {node for node in ready if at.get(f"{self.deployment} on {node}", now) > now}
        return frozenset(f"nodes/{node}" for node in out) if len(out) < len(ready) else frozenset()

    async def _wait_for_room(self, wait: policy.Wait) -> None:
        """Wait until memory becomes free somewhere.

        Raises:
            ResourceExhausted: NO_ROOM, none has become free for a long time.
        """
        began = self._core.now()
        if self._room_until is None:
            self._room_until = began + ROOM_SECONDS
        if began >= self._room_until:
            raise ResourceExhausted(
                "NO_ROOM",
                f"{wait.reason}; it has waited for {ROOM_SECONDS:g} s; call again later, raise the priority "
                f"of deployments/{self.deployment}, or add a node",
                metadata={"deployment": f"deployments/{self.deployment}"},
                retry_after=ROOM_RETRY,
            )
        if wait.reason not in self._reasons[-1:]:
            self._reasons.append(wait.reason)
            log.info("waits_for_room", deployment=self.deployment, because=wait.reason)
        self.waits_for_room = True
        since = self._room_until - ROOM_SECONDS
        with self._core.inventory.waiting_for_room(self._known().priority, since) as changed:
            waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(changed.wait())]
            if wait.until is not None:
                waits.append(asyncio.ensure_future(self._core.clock.sleep(wait.until - began)))
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.waits_for_room = False
                for one in waits:
                    one.cancel()
        self._phase("wait_for_room", began)

    async def _wait(self, wait: policy.Wait) -> None:
        inventory = self._core.inventory
        began = self._core.now()

        nodes = wait.nodes or (inventory.instances[wait.instance].node,)

        def settled() -> bool:
            if wait.nodes:
                return any(inventory.nodes[node].state is not NodeState.CONNECTING for node in nodes)
            known = inventory.instances.get(wait.instance)
            silent = inventory.nodes[nodes[0]].state is not NodeState.READY
            return silent or known is None or (not known.busy and known.state not in policy.JOINABLE)

        subjects = (f"deployments/{self.deployment}", *(f"nodes/{node}" for node in nodes))
        waits = [asyncio.ensure_future(inventory.until(settled, *subjects))]
        if wait.until is not None:
            waits.append(asyncio.ensure_future(self._core.clock.sleep(wait.until - began)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
        self._joined = wait.tier or self._joined
        self._reasons.append(wait.reason)
        self._phase("wait", began)

    def _unused(self, instance: Instance) -> bool:
        return (
            instance.state is InstanceState.SERVING
            and not instance.busy
            and not instance.served
            and not instance.in_flight
            and self._core.inventory.nodes[instance.node].state is NodeState.READY
        )

    # Acting

    async def _perform(self, attempt: policy.Attempt) -> str:
        """Carry out an attempt; returns the id of the instance that should serve now."""
        instance = attempt.instance
        if attempt.tier is Tier.PARKED:
            self._phases.extend(await self._instances.resume_on(instance, attempt.gpu, attempt.yields))
        elif attempt.tier is not Tier.RESIDENT:
            created = await self._instances.create(
                self._known(), attempt.node, attempt.snapshot, attempt.gpu, attempt.need, attempt.yields
            )
            instance = created.instance
            self._phases.extend(created.phases)
        if attempt.capture:
            await self._capture_first(instance)
        return instance

    async def _capture_first(self, instance: str) -> None:
        """Capture before any prompt enters. A failure delays the next capture, and the start goes on."""
        began = self._core.now()
        try:
            snapshot = names.new_id(self.deployment[:48].rstrip("-"))
            captured = await self._instances.capture(self._known(), instance, snapshot)
        except DumontError as error:
            self._captures.failed(self.deployment, self._core.now())
            self._reasons.append(f"capture of instances/{instance} failed: {error.reason}: {error.message}")
            log.warning("capture_failed", deployment=self.deployment, instance=instance, reason=error.reason)
        else:
            self._captures.succeeded(self.deployment)
            self._reasons.append(f"captured snapshots/{captured.id}")
        self._phase("capture", began)

    # Ending

    def _serves(self, instance: str) -> bool:
        known = self._core.inventory.instances.get(instance)
        return known is not None and known.state is InstanceState.SERVING

    def _succeeded(self, attempt: policy.Attempt, instance: str) -> Started:
        tier = attempt.tier
        self._ruled_out.succeeded(f"{self.deployment} on {attempt.node}")
        if tier is Tier.RESIDENT and self._joined is not None:
            tier = self._joined
        for phase in self._phases:
            self._core.metrics.phases.labels(phase.name).observe(phase.seconds)
        self._core.metrics.starts.labels(tier.value, "ok").inc()
        self._core.inventory.reasons[instance] = (f"{tier.value} start: {attempt.reason}",)
        log.info(
            "started",
            deployment=self.deployment,
            instance=instance,
            tier=tier.value,
            reasons=self._reasons,
            seconds=round(total_seconds(self._phases), 4),
        )
        return Started(tier, tuple(self._reasons), tuple(self._phases))

    def _fall_back(self, attempt: policy.Attempt, error: DumontError) -> None:
        """Rule out what failed, or raise when nothing is left to attempt."""
        what = {
            Tier.RESIDENT: f"capture of instances/{attempt.instance}",
            Tier.PARKED: f"resume of instances/{attempt.instance}",
            Tier.LOCAL: f"restore from snapshots/{attempt.snapshot}",
            Tier.REMOTE: f"restore from snapshots/{attempt.snapshot} in the object store",
            Tier.COLD: f"cold start on nodes/{attempt.node}",
        }[attempt.tier]
        reason = f"{what} failed: {error.reason}: {error.message}"
        self._core.metrics.starts.labels(attempt.tier.value, "failed").inc()
        log.warning("attempt_failed", deployment=self.deployment, tier=attempt.tier.value, reason=reason)
        if self._learns_of_room(attempt, error):
            pass
        elif error.reason == NODE_UNAVAILABLE and not self._rechecked:
            # Nobody knows what became of the call. The node is asked, and what it has begun is joined.
            self._rechecked = True
            self._core.fleet.recheck(attempt.node)
        elif attempt.tier is Tier.COLD:
            self._failed.add(f"nodes/{attempt.node}")
            if not isinstance(error, InvalidArgument):
                self._ruled_out.failed(f"{self.deployment} on {attempt.node}", self._core.now())
            if isinstance(error, InvalidArgument) or not self._another_node():
                raise _with_history(error, self._reasons[:-1])
        elif attempt.tier is Tier.LOCAL and (
            error.reason in DAMAGED_COPY or isinstance(error, ResourceExhausted)
        ):
            # Only this copy is damaged, or only this node is full; another one may do.
            self._failed.add(f"snapshots/{attempt.snapshot} on nodes/{attempt.node}")
        elif attempt.snapshot:
            self._failed.add(f"snapshots/{attempt.snapshot}")
        else:
            self._failed.add(f"instances/{attempt.instance}")
        self._reasons.append(reason)
        self._core.metrics.fallbacks.labels(attempt.tier.value, error.reason).inc()

    def _learns_of_room(self, attempt: policy.Attempt, error: DumontError) -> bool:
        """Whether a start failed for want of room that was not known; then it is decided again."""
        if error.reason not in ("ROOM_NOT_MADE", "GPU_MEMORY") or self._rooms_not_made >= ROOM_ATTEMPTS:
            return False
        self._rooms_not_made += 1
        if error.reason == "GPU_MEMORY":
            told = error.metadata
            if not {"gpu", "free_bytes", "needed_bytes"} <= told.keys():
                return False
            inventory = self._core.inventory
            inventory.estimates.needs(self.deployment, int(told["needed_bytes"]))
            inventory.learn_free(attempt.node, told["gpu"], int(told["free_bytes"]))
        return True

    def _another_node(self) -> bool:
        """Whether a cold start may be attempted on another node; after several, all would fail."""
        tried = [name for name in self._failed if name.startswith("nodes/")]
        nodes = self._core.inventory.nodes.values()
        engine = self._known().engine
        left = [
            n
            for n in nodes
            if n.takes_starts and f"nodes/{n.id}" not in self._failed and engines.runs(engine, n.engines)
        ]
        return len(tried) < COLD_ATTEMPTS and bool(left)

    def _phase(self, name: str, began: float) -> None:
        self._phases.append(Phase(name, self._core.now() - began))


def _with_history(error: DumontError, reasons: list[str]) -> DumontError:
    if not reasons:
        return error
    kind = DumontError if type(error).code == "UNKNOWN" else ERRORS[error.code]
    return kind(
        error.reason,
        f"{error.message}; before that: {'; '.join(reasons)}",
        metadata=error.metadata,
        field=error.field,
        retry_after=error.retry_after,
    )

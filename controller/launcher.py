"""One start, from its first decision to an instance that serves: tier by tier, every failure told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from controller import policy
from controller.backoff import Backoff
from controller.catalogue import Catalogue
from controller.commands import NODE_UNAVAILABLE, Commands
from controller.fleet import Fleet
from controller.inventory import Inventory
from controller.machine import SAW, Event
from controller.metrics import Metrics
from controller.model import (
    Deployment,
    Instance,
    InstanceState,
    Intent,
    NodeState,
    Phase,
    Report,
    Snapshot,
    Tier,
)
from controller.ports import Clock, Nodes, Registry
from controller.tasks import Tasks
from dumont import names
from dumont.errors import ERRORS, DumontError

log = structlog.get_logger()

Told = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Started:
    """How a start ended well."""

    tier: Tier
    reasons: tuple[str, ...]
    phases: tuple[Phase, ...]


@dataclass(slots=True)
class Attempt:
    """One start under way: what was tried, why, and how long each step took."""

    deployment: str
    failed: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    joined: Tier | None = None
    silences: int = 0


class Launcher:
    """Carries out decisions. It does not know who waits, nor that there may be two starts at once."""

    def __init__(
        self,
        nodes: Nodes,
        registry: Registry,
        inventory: Inventory,
        catalogue: Catalogue,
        fleet: Fleet,
        commands: Commands,
        clock: Clock,
        tasks: Tasks,
        metrics: Metrics,
    ) -> None:
        self._nodes = nodes
        self._registry = registry
        self._inventory = inventory
        self._catalogue = catalogue
        self._fleet = fleet
        self._commands = commands
        self._clock = clock
        self._tasks = tasks
        self._metrics = metrics
        self._captures = Backoff(first=30.0, limit=3600.0)

    def resident(self, deployment: str) -> policy.Start | None:
        """The instance that can answer now, if there is one and it need not be captured first."""
        known = self._catalogue.get_active(deployment)
        facts = self.facts(known)
        if not any(i.state is InstanceState.SERVING for i in facts.instances):
            return None
        decision = policy.decide(facts, self._clock.moment().steady)
        if isinstance(decision, policy.Start) and decision.tier is Tier.RESIDENT and not decision.capture:
            return decision
        return None

    # A start

    async def start(self, deployment: str) -> Started:
        """Decide and act until an instance serves.

        Raises:
            DumontError: the last tier failed; the message tells of the others.
        """
        attempt = Attempt(deployment)
        while True:
            decision = self._decide(attempt)
            if isinstance(decision, policy.Wait):
                await self._wait(attempt, decision)
                continue
            attempt.reasons.append(decision.reason)
            before = self._clock.moment().steady
            try:
                instance = await self._perform(attempt, decision)
            except DumontError as error:
                attempt.phases.append(
                    Phase(f"failed_{decision.tier.value}", self._clock.moment().steady - before)
                )
                self._fall_back(attempt, decision, error)
                continue
            if self._serves(instance):
                return self._succeeded(attempt, decision, instance)

    def _decide(self, attempt: Attempt) -> policy.Start | policy.Wait:
        before = self._clock.moment().steady
        deployment = self._catalogue.get_active(attempt.deployment)
        facts = self.facts(deployment, frozenset(attempt.failed))
        decision = policy.decide(facts, before)
        self._phase(attempt, "decide", before)
        return decision

    async def _wait(self, attempt: Attempt, wait: policy.Wait) -> None:
        before = self._clock.moment().steady

        def settled() -> bool:
            if wait.node:
                return self._inventory.nodes[wait.node].state is not NodeState.CONNECTING
            known = self._inventory.instances.get(wait.instance)
            return known is None or (not known.busy and known.state not in policy.JOINABLE)

        node = self._inventory.instances[wait.instance].node if wait.instance else wait.node

        def silent() -> bool:
            return self._inventory.nodes[node].state is not NodeState.READY

        await self._inventory.until(settled if wait.node else lambda: settled() or silent())
        attempt.joined = wait.tier or attempt.joined
        attempt.reasons.append(wait.reason)
        self._phase(attempt, "wait", before)

    def _succeeded(self, attempt: Attempt, decision: policy.Start, instance: str) -> Started:
        tier = decision.tier
        if tier is Tier.RESIDENT and attempt.joined is not None:
            tier = attempt.joined
        for phase in attempt.phases:
            self._metrics.phases.labels(phase.name).observe(phase.seconds)
        self._metrics.starts.labels(tier.value, "ok").inc()
        log.info(
            "started",
            deployment=attempt.deployment,
            instance=instance,
            tier=tier.value,
            reasons=attempt.reasons,
            seconds=round(_total(attempt.phases), 4),
        )
        return Started(tier, tuple(attempt.reasons), tuple(attempt.phases))

    def _fall_back(self, attempt: Attempt, decision: policy.Start, error: DumontError) -> None:
        """Rule out what failed and return, or raise when nothing is left to try."""
        what = {
            Tier.RESIDENT: f"capture of instances/{decision.instance}",
            Tier.PARKED: f"resume of instances/{decision.instance}",
            Tier.LOCAL: f"restore from snapshots/{decision.snapshot}",
            Tier.REMOTE: f"restore from snapshots/{decision.snapshot} in the object store",
            Tier.COLD: f"cold start on nodes/{decision.node}",
        }[decision.tier]
        reason = f"{what} failed: {error.reason}: {error.message}"
        self._metrics.starts.labels(decision.tier.value, "failed").inc()
        log.warning(
            "start_tier_failed", deployment=attempt.deployment, tier=decision.tier.value, reason=reason
        )
        if error.reason == NODE_UNAVAILABLE and attempt.silences < 1:
            # Nothing is known about the call: the node is asked, and what it did is joined.
            attempt.silences += 1
            self._fleet.recheck(decision.node)
        elif decision.tier is Tier.COLD:
            raise _with_history(error, attempt.reasons[:-1])
        elif decision.snapshot:
            attempt.failed.add(f"snapshots/{decision.snapshot}")
        else:
            attempt.failed.add(f"instances/{decision.instance}")
        attempt.reasons.append(reason)
        self._metrics.fallbacks.labels(decision.tier.value, error.reason).inc()

    async def _perform(self, attempt: Attempt, decision: policy.Start) -> str:
        """Do what was decided; returns the id of the instance that should serve now."""
        if decision.tier is Tier.RESIDENT:
            instance = decision.instance
        elif decision.tier is Tier.PARKED:
            instance = decision.instance
            before = self._clock.moment().steady
            report = (await self._commands.resume(instance)).report
            self._node_phases(attempt, report, before)
        else:
            instance = await self._create(attempt, decision.node, decision.snapshot)
        if decision.capture:
            await self._capture(attempt, instance)
        return instance

    async def _create(self, attempt: Attempt, node: str, snapshot: str) -> str:
        """Start, or restore from ``snapshot`` when it is not empty. Nothing is awaited once it serves."""
        deployment = self._catalogue.get_active(attempt.deployment)
        instance = names.new_id(deployment.id[:48].rstrip("-"))
        intent = Intent(instance, deployment.id, node, snapshot, self._clock.moment().wall)
        # Expected first, so that a node asked meanwhile does not make it look like a stranger's.
        self._inventory.expect(intent)
        before = self._clock.moment().steady
        try:
            await self._registry.save_intent(intent)
            self._phase(attempt, "record", before)
            before = self._clock.moment().steady
            if snapshot:
                made = self._inventory.captured.get(snapshot)
                digest = made.manifest_digest if made else ""
                report = await self._nodes.restore(node, instance, deployment.id, snapshot, digest)
            else:
                weights = deployment.checkpoint.weights
                report = await self._nodes.start(
                    node, instance, deployment.id, deployment.model, deployment.engine, weights
                )
        except BaseException as error:
            self._inventory.finish(instance, Event.REFUSED)
            self._tasks.spawn(self._clean_up(node, instance, error), f"clean up {instance}")
            if snapshot and isinstance(error, DumontError):
                await self._refresh_snapshots(node)
            raise
        self._inventory.finish(instance, SAW[report.state], report)
        if snapshot and not any(c.local for c in self._inventory.copies(snapshot) if c.node == node):
            # Fetched: the node holds it now.
            self._tasks.spawn(self._refresh_snapshots(node), f"refresh snapshots of {node}")
        self._node_phases(attempt, report, before)
        self._tasks.spawn(self._registry.drop_intent(instance), f"drop intent {instance}")
        return instance

    async def _clean_up(self, node: str, instance: str, error: BaseException) -> None:
        """A start failed: nothing of it may stay on the node."""
        if getattr(error, "reason", "") != NODE_UNAVAILABLE:
            try:
                await self._commands.stop(instance)
            except DumontError as failure:
                log.warning("clean_up_failed", node=node, instance=instance, reason=failure.reason)
        else:
            # It may well have started. The node tells when it answers again.
            self._inventory.removed(instance)
        await self._registry.drop_intent(instance)

    async def _refresh_snapshots(self, node: str) -> None:
        # The failure may have quarantined it, which must be known before the next decision.
        try:
            await self._fleet.refresh_snapshots(node)
        except DumontError as error:
            log.warning("refresh_failed", node=node, reason=error.reason)

    async def _capture(self, attempt: Attempt, instance: str) -> None:
        """Capture before any prompt; a failure is told and backed off from, and the start goes on."""
        before = self._clock.moment().steady
        try:
            captured = await self._commands.capture(
                instance, names.new_id(attempt.deployment[:48].rstrip("-"))
            )
        except DumontError as error:
            self._captures.failed(attempt.deployment, self._clock.moment().steady)
            self._metrics.captures.labels("failed").inc()
            attempt.reasons.append(f"capture of instances/{instance} failed: {error.reason}: {error.message}")
            log.warning(
                "capture_failed", deployment=attempt.deployment, instance=instance, reason=error.reason
            )
            await self._commands.refresh(instance)
        else:
            self._captures.succeeded(attempt.deployment)
            self._metrics.captures.labels("ok").inc()
            attempt.reasons.append(f"captured snapshots/{captured.id}")
        self._phase(attempt, "capture", before)

    # A snapshot on request

    async def snapshot(self, deployment: str, snapshot: str, told: Told) -> Snapshot:
        """Capture an instance that no prompt has entered, started for it when there is none.

        Args:
            deployment: its id.
            snapshot: the new snapshot's id.
            told: called with the instance's id and the stage ("starting", "capturing").

        Raises:
            DumontError: the start or the capture failed.
        """
        attempt = Attempt(deployment)
        wanted = self._catalogue.get_active(deployment).checkpoint.weights
        instances = self._inventory.instances_of(deployment)
        clean = next((i.id for i in instances if i.report.weights is wanted and self._clean(i)), None)
        if clean is None:
            node = policy.place({n.id: n for n in self._inventory.nodes.values() if n.checkpoint_capable})
            told("", "starting")
            clean = await self._create(attempt, node.id, "")
        told(clean, "capturing")
        try:
            captured = await self._commands.capture(clean, snapshot)
        except DumontError:
            self._metrics.captures.labels("failed").inc()
            await self._commands.refresh(clean)
            raise
        self._captures.succeeded(deployment)
        self._metrics.captures.labels("ok").inc()
        return captured

    def _clean(self, instance: Instance) -> bool:
        return (
            instance.state is InstanceState.SERVING
            and not instance.busy
            and not instance.served
            and not instance.in_flight
            and self._inventory.nodes[instance.node].state is NodeState.READY
        )

    # Facts and phases

    def facts(self, deployment: Deployment, failed: frozenset[str] = frozenset()) -> policy.Facts:
        return policy.Facts(
            deployment=deployment,
            instances=self._inventory.instances_of(deployment.id),
            snapshots=self._inventory.snapshots_of(deployment.id),
            nodes=self._inventory.nodes,
            failed=failed,
            capture_at=self._captures.at.get(deployment.id, 0.0),
        )

    def _serves(self, instance: str) -> bool:
        known = self._inventory.instances.get(instance)
        return known is not None and known.state is InstanceState.SERVING

    def _phase(self, attempt: Attempt, name: str, since: float) -> None:
        attempt.phases.append(Phase(name, self._clock.moment().steady - since))

    def _node_phases(self, attempt: Attempt, report: Report, since: float) -> None:
        """The node's own steps, and as "dispatch" what the way to it and back took."""
        spent = self._clock.moment().steady - since
        attempt.phases.append(Phase("dispatch", max(0.0, spent - _total(report.phases))))
        attempt.phases.extend(report.phases)


def _total(phases: Iterable[Phase]) -> float:
    """Seconds of all phases; one called ``load.warm_up`` is a part of ``load`` and counted there."""
    return sum(phase.seconds for phase in phases if "." not in phase.name)


def _with_history(error: DumontError, reasons: list[str]) -> DumontError:
    if not reasons:
        return error
    told = DumontError if type(error).code == "UNKNOWN" else ERRORS[error.code]
    return told(
        error.reason,
        f"{error.message}; before that: {'; '.join(reasons)}",
        metadata=error.metadata,
        field=error.field,
        retry_after=error.retry_after,
    )

"""Deployments: checked, stored, then held in memory, so that no request waits for the database."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Final

from controller import policy
from controller.inventory import Inventory
from controller.membership import Membership
from controller.model import (
    Checkpoint,
    Deployment,
    Instance,
    NodeState,
    ResolvedModel,
    StartMode,
    Storage,
    Weights,
)
from controller.ports import Clock, Nodes, Registry
from dumont import engines, names
from dumont.errors import (
    Aborted,
    AlreadyExists,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)


@dataclass(frozen=True, slots=True)
class Draft:
    """The settable fields of a deployment; None where the caller left one out."""

    model: str
    engine: str
    start_mode: StartMode
    checkpoint_enabled: bool | None = None
    checkpoint_ttl: float | None = None
    checkpoint_storage: Storage = Storage.LOCAL
    checkpoint_weights: Weights = Weights.DETACHED
    idle_timeout: float | None = None
    park_timeout: float | None = None
    priority: int = 0
    min_instances: int | None = None
    max_instances: int | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)


# Paths of an update mask, and the fields of the draft that they replace.
MUTABLE: Final[Mapping[str, tuple[str, ...]]] = {
    "start_mode": ("start_mode",),
    "checkpoint": ("checkpoint_enabled", "checkpoint_ttl", "checkpoint_storage", "checkpoint_weights"),
    "checkpoint.enabled": ("checkpoint_enabled",),
    "checkpoint.ttl": ("checkpoint_ttl",),
    "checkpoint.storage": ("checkpoint_storage",),
    "checkpoint.weights": ("checkpoint_weights",),
    "idle_timeout": ("idle_timeout",),
    "park_timeout": ("park_timeout",),
    "priority": ("priority",),
    "min_instances": ("min_instances",),
    "max_instances": ("max_instances",),
}
IMMUTABLE: Final = frozenset({"model", "engine", "engine_options"})
OPTIONS_FIELD: Final = "deployment.engine_options"
OUTPUT_ONLY: Final = frozenset(
    {"name", "uid", "state", "state_message", "create_time", "update_time", "last_use_time", "etag"}
)


class Deployments:
    """Every deployment and when it was last used."""

    def __init__(
        self, registry: Registry, nodes: Nodes, inventory: Inventory, clock: Clock, membership: Membership
    ) -> None:
        self._registry = registry
        self._nodes = nodes
        self._inventory = inventory
        self._clock = clock
        self._membership = membership
        self._unsaved: set[str] = set()
        self.by_id: dict[str, Deployment] = {}
        self.last_use: dict[str, float] = {}

    def load(self, deployments: tuple[Deployment, ...], last_use: Mapping[str, float]) -> None:
        """At start-up: take in what the registry holds."""
        self.last_use = dict(last_use)
        for deployment in deployments:
            self._keep(deployment)

    def take_in(self, stored: Iterable[Deployment], kept: Set[str], last_use: Mapping[str, float]) -> None:
        """Take in what other controllers have stored.

        Args:
            stored: deployments that this controller has not held itself until now.
            kept: the ids of those that it has.
            last_use: when each was last used.
        """
        found = {deployment.id: deployment for deployment in stored}
        for identifier in [i for i in self.by_id if i not in kept and i not in found]:
            self._drop(identifier)
        for deployment in found.values():
            if self.by_id.get(deployment.id) != deployment:
                self._keep(deployment)
            if deployment.id in last_use:
                self.last_use[deployment.id] = last_use[deployment.id]

    def get(self, deployment: str, field: str = "name") -> Deployment:
        """The deployment of this id; ``field`` is the request field that named it.

        Raises:
            NotFound: there is none.
        """
        if deployment not in self.by_id:
            raise NotFound(
                "DEPLOYMENT_NOT_FOUND",
                f"there is no deployments/{deployment}"
                + (names.did_you_mean(deployment, self.by_id) or "; create it first, or list what there is"),
                field=field,
                metadata={"deployment": f"deployments/{deployment}"},
            )
        return self.by_id[deployment]

    def owned(self, instances: Iterable[Instance]) -> frozenset[str]:
        """The ids of those of the instances that belong to a deployment."""
        return frozenset(
            i.id for i in instances if (owner := self.by_id.get(i.deployment)) and owner.runs(i.report)
        )

    def get_active(self, deployment: str, field: str = "deployment") -> Deployment:
        """The deployment of this id, if it is not being deleted.

        Raises:
            NotFound: there is none.
            FailedPrecondition: DEPLOYMENT_DELETING.
        """
        found = self.get(deployment, field)
        if found.deleting:
            raise FailedPrecondition(
                "DEPLOYMENT_DELETING",
                f"deployments/{deployment} is being deleted; create another one",
                metadata={"deployment": f"deployments/{deployment}"},
            )
        return found

    async def create(self, identifier: str, draft: Draft, request_id: str) -> Deployment:
        """Check a draft, resolve its model on a node, and store the deployment.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: the settings contradict each other, an engine option is wrong, or the model
                cannot be served.
            NotFound, FailedPrecondition: the node cannot serve the model; OBJECT_STORE_NOT_CONFIGURED;
                ENGINE_NOT_INSTALLED, no node has the engine; OPTION_UNSUPPORTED, its version lacks an option.
            Unavailable: NO_NODE, no node can check the model.
        """
        checkpoint = _checkpoint(draft)
        _check_ttl(draft, checkpoint)
        _check_instances(draft)
        for known in self.by_id.values():
            if request_id and known.request_id == request_id:
                return known
        if identifier in self.by_id:
            raise AlreadyExists(
                "DEPLOYMENT_EXISTS",
                f"deployments/{identifier} exists; choose another id, or update it",
                field="deployment_id",
                metadata={"deployment": f"deployments/{identifier}"},
            )
        self._check_storage(checkpoint)
        engines.check_engine(draft.engine, "deployment.engine")
        options = engines.check_options(draft.engine, draft.engine_options, field=OPTIONS_FIELD)
        model = await self._resolve(draft)
        now = self._clock.moment().wall
        deployment = Deployment(
            id=identifier,
            uid=str(uuid.uuid4()),
            model=draft.model,
            engine=model.engine,
            start_mode=draft.start_mode,
            checkpoint=checkpoint,
            idle_timeout=draft.idle_timeout,
            park_timeout=draft.park_timeout,
            priority=draft.priority,
            min_instances=draft.min_instances,
            max_instances=draft.max_instances,
            weights_bytes=model.weights_bytes,
            create_time=now,
            update_time=now,
            etag=uuid.uuid4().hex,
            request_id=request_id,
            engine_options=options,
        )
        stored = await self._registry.create_deployment(deployment)
        if stored.uid == deployment.uid:
            self._membership.hold(stored.id)
            self._keep(stored)
        # Otherwise another call has stored the same request, perhaps at another controller, the holder then.
        return stored

    async def _resolve(self, draft: Draft) -> ResolvedModel:
        node = policy.place(self._inventory.nodes, engine=draft.engine)
        # The model may be started on another node with another version, which then checks them again.
        engines.check_options(
            draft.engine, draft.engine_options, node.engines.get(draft.engine, ""), OPTIONS_FIELD
        )
        try:
            return await self._nodes.resolve_model(node.id, draft.model, draft.engine)
        except (NotFound, FailedPrecondition, InvalidArgument) as error:
            raise _at_field(error, "deployment.model") from error

    def _check_storage(self, checkpoint: Checkpoint) -> None:
        if checkpoint.storage is Storage.LOCAL:
            return
        ready = [node for node in self._inventory.nodes.values() if node.state is NodeState.READY]
        if not any(node.object_store for node in ready):
            raise FailedPrecondition(
                "OBJECT_STORE_NOT_CONFIGURED",
                f"none of the {len(ready)} ready nodes has an object store; start a snapshotd with "
                "--store-url, or use STORAGE_LOCAL",
                field="deployment.checkpoint.storage",
            )

    async def update(self, identifier: str, draft: Draft, paths: frozenset[str], etag: str) -> Deployment:
        """Replace the fields that ``paths`` name.

        Args:
            identifier: the deployment's id.
            draft: has the new values.
            paths: of the update mask.
            etag: the deployment's, if nobody else may have changed it; or empty.

        Raises:
            NotFound: there is no such deployment.
            InvalidArgument: UNKNOWN_FIELD, IMMUTABLE_FIELD or contradicting settings.
            Aborted: ETAG_MISMATCH.
            FailedPrecondition: OBJECT_STORE_NOT_CONFIGURED.
        """
        old = self.get_active(identifier, "deployment.name")
        fields = _changed_fields(old, draft, paths)
        if etag and etag != old.etag:
            raise Aborted(
                "ETAG_MISMATCH",
                f"deployments/{identifier} was changed since it was read; read it again and repeat",
                field="deployment.etag",
                metadata={"deployment": f"deployments/{identifier}"},
            )
        current = Draft(
            model=old.model,
            engine=old.engine,
            start_mode=old.start_mode,
            checkpoint_enabled=None,
            checkpoint_ttl=old.checkpoint.ttl,
            checkpoint_storage=old.checkpoint.storage,
            checkpoint_weights=old.checkpoint.weights,
            idle_timeout=old.idle_timeout,
            park_timeout=old.park_timeout,
            priority=old.priority,
            min_instances=old.min_instances,
            max_instances=old.max_instances,
        )
        merged = replace(current, **{name: getattr(draft, name) for name in fields})
        if "checkpoint_enabled" not in fields and "start_mode" not in fields:
            merged = replace(merged, checkpoint_enabled=old.checkpoint.enabled)
        checkpoint = _checkpoint(merged)
        if "checkpoint_ttl" in fields:
            _check_ttl(draft, checkpoint)
        _check_instances(merged)
        if checkpoint.storage is not old.checkpoint.storage:
            self._check_storage(checkpoint)
        new = replace(
            old,
            start_mode=merged.start_mode,
            checkpoint=checkpoint,
            idle_timeout=merged.idle_timeout,
            park_timeout=merged.park_timeout,
            priority=merged.priority,
            min_instances=merged.min_instances,
            max_instances=merged.max_instances,
            update_time=self._clock.moment().wall,
            etag=uuid.uuid4().hex,
        )
        await self._registry.update_deployment(new, old.etag)
        self._keep(new)
        return new

    async def begin_delete(self, identifier: str) -> None:
        """Mark a deployment for deletion; the reconciler ends what it has and then forgets it."""
        old = self.get(identifier)
        if old.deleting:
            return
        new = replace(old, deleting=True, etag=uuid.uuid4().hex, update_time=self._clock.moment().wall)
        await self._registry.update_deployment(new, old.etag)
        self._keep(new)

    async def forget(self, identifier: str) -> None:
        """Remove a deployment of which nothing is left."""
        await self._registry.delete_deployment(identifier)
        self._membership.let_go(identifier)
        self._drop(identifier)

    def used(self, identifier: str) -> None:
        """Note that a deployment is in use now. Only memory is touched; ``save_last_use`` stores it later."""
        self.last_use[identifier] = self._clock.moment().wall
        self._unsaved.add(identifier)

    async def save_last_use(self) -> None:
        """Store the times that changed since the last call."""
        unsaved, self._unsaved = self._unsaved, set()
        times = {key: self.last_use[key] for key in unsaved if key in self.last_use}
        if not times:
            return
        try:
            await self._registry.save_last_use(times)
        except BaseException:
            self._unsaved |= unsaved
            raise

    def _drop(self, identifier: str) -> None:
        self.by_id.pop(identifier, None)
        self._inventory.estimates.forget(identifier)
        self.last_use.pop(identifier, None)
        self._unsaved.discard(identifier)
        self._inventory.touch(f"deployments/{identifier}")

    def _keep(self, deployment: Deployment) -> None:
        self.by_id[deployment.id] = deployment
        self._inventory.estimates.weights_bytes[deployment.id] = deployment.weights_bytes
        self._inventory.touch(f"deployments/{deployment.id}")


def _checkpoint(draft: Draft) -> Checkpoint:
    wanted = draft.start_mode is StartMode.CHECKPOINT
    if wanted and draft.checkpoint_enabled is False:
        raise InvalidArgument(
            "CHECKPOINT_DISABLED",
            "start mode checkpoint needs checkpointing; leave deployment.checkpoint.enabled unset, or choose "
            "START_MODE_COLD or START_MODE_WARM",
            field="deployment.checkpoint.enabled",
        )
    enabled = wanted if draft.checkpoint_enabled is None else draft.checkpoint_enabled
    return Checkpoint(enabled, draft.checkpoint_ttl, draft.checkpoint_storage, draft.checkpoint_weights)


def _check_instances(draft: Draft) -> None:
    least, most = draft.min_instances, draft.max_instances
    if least is not None and most is not None and least > most:
        raise InvalidArgument(
            "INSTANCES_DISAGREE",
            f"min_instances is {least} and max_instances {most}; the first must not be larger",
            field="deployment.min_instances",
            metadata={"min_instances": str(least), "max_instances": str(most)},
        )


def _check_ttl(draft: Draft, checkpoint: Checkpoint) -> None:
    """Refuse a ttl that would have no effect."""
    if draft.checkpoint_ttl is not None and not checkpoint.enabled:
        raise InvalidArgument(
            "TTL_WITHOUT_SNAPSHOTS",
            f"start mode {draft.start_mode.value} makes no snapshots, so a ttl would have no effect; leave "
            "it out, use START_MODE_CHECKPOINT, or set checkpoint.enabled to have snapshots on request",
            field="deployment.checkpoint.ttl",
        )


def _changed_fields(old: Deployment, draft: Draft, paths: frozenset[str]) -> set[str]:
    fields: set[str] = set()
    for path in sorted(paths):
        root = path.partition(".")[0]
        if root in OUTPUT_ONLY:
            continue
        if path in IMMUTABLE:
            if getattr(draft, path) != getattr(old, path):
                raise InvalidArgument(
                    "IMMUTABLE_FIELD",
                    f"deployment.{path} cannot be changed; create another deployment",
                    field=f"deployment.{path}",
                    metadata={"path": path},
                )
            continue
        if path not in MUTABLE:
            raise InvalidArgument(
                "UNKNOWN_FIELD",
                f"update_mask names {path[:80]!r}, which is not a field of a deployment that can be set",
                field="update_mask",
                metadata={"path": path[:80]},
            )
        fields.update(MUTABLE[path])
    return fields


def _at_field(error: DumontError, field: str) -> DumontError:
    return type(error)(
        error.reason, error.message, metadata=error.metadata, field=field, retry_after=error.retry_after
    )

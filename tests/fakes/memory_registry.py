"""The registry in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controller.identity import Identity
from controller.model import Captured, Deployment, Intent, Node
from controller.ports import Stored
from dumont.errors import Aborted, AlreadyExists


class MemoryRegistry:
    """A registry that survives a controller when it is handed to the next one."""

    def __init__(self) -> None:
        self._deployments: dict[str, Deployment] = {}
        self._nodes: dict[str, Node] = {}
        self._intents: dict[str, Intent] = {}
        self._captured: dict[str, Captured] = {}
        self._last_use: dict[str, float] = {}
        self._identity: Identity | None = None

    async def identity(self) -> Identity | None:
        return self._identity

    async def save_identity(self, identity: Identity) -> None:
        self._identity = identity

    async def load(self) -> Stored:
        return Stored(
            tuple(self._deployments.values()),
            tuple(self._nodes.values()),
            tuple(self._intents.values()),
            tuple(self._captured.values()),
            dict(self._last_use),
        )

    async def create_deployment(self, deployment: Deployment) -> Deployment:
        for known in self._deployments.values():
            if deployment.request_id and known.request_id == deployment.request_id:
                return known
        if deployment.id in self._deployments:
            raise AlreadyExists(
                "DEPLOYMENT_EXISTS", f"deployments/{deployment.id} exists", field="deployment_id"
            )
        self._deployments[deployment.id] = deployment
        return deployment

    async def update_deployment(self, deployment: Deployment, etag: str) -> None:
        known = self._deployments.get(deployment.id)
        if known is None or known.etag != etag:
            raise Aborted("ETAG_MISMATCH", f"deployments/{deployment.id} was changed meanwhile")
        self._deployments[deployment.id] = deployment

    async def delete_deployment(self, deployment: str) -> None:
        self._deployments.pop(deployment, None)
        self._last_use.pop(deployment, None)

    async def save_last_use(self, times: Mapping[str, float]) -> None:
        self._last_use.update({key: value for key, value in times.items() if key in self._deployments})

    async def save_node(self, node: Node) -> None:
        self._nodes[node.id] = node

    async def save_intent(self, intent: Intent) -> None:
        self._intents[intent.instance] = intent

    async def drop_intents(self, instances: Iterable[str]) -> None:
        for instance in instances:
            self._intents.pop(instance, None)

    async def save_captured(self, captured: Captured) -> None:
        self._captured[captured.id] = captured

    async def drop_captured(self, snapshot: str) -> None:
        self._captured.pop(snapshot, None)

    async def close(self) -> None:
        return None

"""The registry in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from controller.identity import Decide, Established, Identity
from controller.model import Captured, Deployment, Intent, Node
from controller.ports import Clock, Members, Stored, StoredOperation
from dumont.errors import Aborted, AlreadyExists, Unavailable


@dataclass
class MemoryDatabase:
    """What registries share.

    Args:
        clock: of the database; None: only one controller uses it.
    """

    clock: Clock | None = None
    # Whether it answers.
    up: bool = True
    deployments: dict[str, Deployment] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    intents: dict[str, Intent] = field(default_factory=dict)
    captured: dict[str, Captured] = field(default_factory=dict)
    last_use: dict[str, float] = field(default_factory=dict)
    holders: dict[str, int] = field(default_factory=dict)
    operations: dict[str, StoredOperation] = field(default_factory=dict)
    identity: Identity | None = None
    revision: int = 0
    # Address and the time at which it expires, by number.
    sessions: dict[int, tuple[str, float]] = field(default_factory=dict)
    # The sessions that have held each deployment, in order.
    held: dict[str, list[int]] = field(default_factory=dict)
    # Sessions whose controllers do not get through to it at the moment.
    stopped: set[int] = field(default_factory=set)

    def hold(self, deployment: str, session: int) -> None:
        self.holders[deployment] = session
        self.held.setdefault(deployment, []).append(session)

    def now(self) -> float:
        return self.clock.moment().wall if self.clock is not None else 0.0


class MemoryRegistry:
    """A registry that survives a controller when it is handed to the next one."""

    def __init__(self, database: MemoryDatabase | None = None) -> None:
        self.database = database or MemoryDatabase()
        self.session = 0

    # Sessions

    async def join(self, decide: Decide, address: str, seconds: float) -> Established:
        data = self._reach()
        established = decide(data.identity, not (data.deployments or data.nodes))
        if data.clock is None:
            data.sessions.clear()
        data.identity = established.identity
        self.session = established.identity.starts
        data.sessions[self.session] = (address, data.now() + seconds)
        data.revision += 1
        return established

    async def renew(self, seconds: float) -> None:
        data = self._writable()
        data.sessions[self.session] = (data.sessions[self.session][0], data.now() + seconds)

    async def end_expired(self) -> None:
        data = self._writable()
        if data.clock is not None:
            for number, (_, expires) in list(data.sessions.items()):
                if expires <= data.now() and number != self.session:
                    del data.sessions[number]

    async def leave(self) -> None:
        self._reach().sessions.pop(self.session, None)

    async def claim(self) -> frozenset[str]:
        data = self._writable()
        taken = frozenset(key for key, holder in data.holders.items() if holder not in data.sessions)
        for deployment in taken:
            data.hold(deployment, self.session)
        data.revision += bool(taken)
        return taken

    async def members(self) -> Members:
        data = self._reach()
        return Members(
            {number: address for number, (address, _) in data.sessions.items()},
            data.identity.starts if data.identity is not None else 0,
            data.revision,
        )

    # Facts

    async def load(self) -> Stored:
        data = self._reach()
        return Stored(
            tuple(data.deployments.values()),
            tuple(data.nodes.values()),
            tuple(data.intents.values()),
            tuple(data.captured.values()),
            dict(data.last_use),
            dict(data.holders),
            await self.members(),
        )

    async def create_deployment(self, deployment: Deployment) -> Deployment:
        data = self._writable()
        for known in data.deployments.values():
            if deployment.request_id and known.request_id == deployment.request_id:
                return known
        if deployment.id in data.deployments:
            raise AlreadyExists(
                "DEPLOYMENT_EXISTS", f"deployments/{deployment.id} exists", field="deployment_id"
            )
        data.deployments[deployment.id] = deployment
        data.hold(deployment.id, self.session)
        data.revision += 1
        return deployment

    async def update_deployment(self, deployment: Deployment, etag: str) -> None:
        data = self._writable()
        known = data.deployments.get(deployment.id)
        if known is None or known.etag != etag:
            raise Aborted("ETAG_MISMATCH", f"deployments/{deployment.id} was changed meanwhile")
        data.deployments[deployment.id] = deployment
        data.revision += 1

    async def delete_deployment(self, deployment: str) -> None:
        data = self._writable()
        for table in (data.deployments, data.last_use, data.holders):
            table.pop(deployment, None)
        data.revision += 1

    async def save_last_use(self, times: Mapping[str, float]) -> None:
        data = self._writable()
        data.last_use.update({key: value for key, value in times.items() if key in data.deployments})

    async def save_node(self, node: Node) -> None:
        self._revised().nodes[node.id] = node

    async def save_intent(self, intent: Intent) -> None:
        self._writable().intents[intent.instance] = intent

    async def drop_intents(self, instances: Iterable[str]) -> None:
        data = self._writable()
        for instance in instances:
            data.intents.pop(instance, None)

    async def save_captured(self, captured: Captured) -> None:
        self._revised().captured[captured.id] = captured

    async def drop_captured(self, snapshot: str) -> None:
        self._revised().captured.pop(snapshot, None)

    # Operations

    async def save_operation(self, name: str, content: bytes, done: bool) -> None:
        self._writable().operations[name] = StoredOperation(self.session, done, content)

    async def operation(self, name: str) -> StoredOperation | None:
        return self._reach().operations.get(name)

    async def drop_operation(self, name: str) -> None:
        self._writable().operations.pop(name, None)

    async def close(self) -> None:
        return None

    # Inside

    def _reach(self) -> MemoryDatabase:
        if not self.database.up or self.session in self.database.stopped:
            raise Unavailable("DATABASE_UNAVAILABLE", "the database does not answer", retry_after=1.0)
        return self.database

    def _writable(self) -> MemoryDatabase:
        data = self._reach()
        if self.session and self.session not in data.sessions:
            raise Aborted("SESSION_ENDED", f"session {self.session} has ended", retry_after=1.0)
        return data

    def _revised(self) -> MemoryDatabase:
        data = self._writable()
        data.revision += 1
        return data

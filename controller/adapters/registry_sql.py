"""The ``Registry`` port on SQL: SQLite by default, or PostgreSQL if the URL names it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from controller.identity import Decide, Established, Identity
from controller.model import (
    Captured,
    Checkpoint,
    Deployment,
    Finding,
    Gpu,
    Intent,
    Node,
    StartMode,
    Storage,
    Weights,
)
from controller.ports import Members, Stored, StoredOperation
from dumont.errors import Aborted, AlreadyExists, Unavailable

METADATA = sa.MetaData()
DEPLOYMENTS = sa.Table(
    "deployments",
    METADATA,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("uid", sa.String(36), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("engine", sa.String(63), nullable=False),
    sa.Column("start_mode", sa.String(16), nullable=False),
    sa.Column("checkpoint_enabled", sa.Boolean, nullable=False),
    sa.Column("checkpoint_ttl", sa.Double),
    sa.Column("checkpoint_storage", sa.String(16), nullable=False),
    sa.Column("checkpoint_weights", sa.String(16), nullable=False),
    sa.Column("idle_timeout", sa.Double),
    sa.Column("park_timeout", sa.Double),
    sa.Column("create_time", sa.Double, nullable=False),
    sa.Column("update_time", sa.Double, nullable=False),
    sa.Column("last_use_time", sa.Double),
    sa.Column("etag", sa.String(32), nullable=False),
    sa.Column("deleting", sa.Boolean, nullable=False),
    sa.Column("request_id", sa.String(36), unique=True),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("min_instances", sa.Integer),
    sa.Column("max_instances", sa.Integer),
    sa.Column("weights_bytes", sa.BigInteger, nullable=False),
    sa.Column("engine_options", sa.JSON, nullable=False),
    # The session that acts on it.
    sa.Column("holder", sa.Integer, nullable=False, server_default="0"),
)
NODES = sa.Table(
    "nodes",
    METADATA,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False),
)
INTENTS = sa.Table(
    "intents",
    METADATA,
    sa.Column("instance", sa.String(63), primary_key=True),
    sa.Column("deployment", sa.String(63), nullable=False),
    sa.Column("node", sa.String(63), nullable=False),
    sa.Column("snapshot", sa.String(63), nullable=False),
    sa.Column("create_time", sa.Double, nullable=False),
)
CAPTURED = sa.Table(
    "captured",
    METADATA,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("deployment", sa.String(63), nullable=False),
    sa.Column("manifest_digest", sa.String(64), nullable=False),
    sa.Column("deployment_uid", sa.String(36), nullable=False),
    sa.Column("adopt_time", sa.Double, nullable=False),
    sa.Column("node", sa.String(63), nullable=False),
)
CONTROLLER = sa.Table(
    "controller",
    METADATA,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("starts", sa.Integer, nullable=False),
    # Counts the changes that every controller must hear of.
    sa.Column("revision", sa.Integer, nullable=False, server_default="0"),
)
SESSIONS = sa.Table(
    "sessions",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("address", sa.Text, nullable=False),
    # Seconds since 1970, by the database's clock.
    sa.Column("expire_time", sa.Double, nullable=False),
)
OPERATIONS = sa.Table(
    "operations",
    METADATA,
    sa.Column("name", sa.String(127), primary_key=True),
    sa.Column("session", sa.Integer, nullable=False),
    sa.Column("done", sa.Boolean, nullable=False),
    sa.Column("update_time", sa.Double, nullable=False),
    # google.longrunning.Operation
    sa.Column("content", sa.LargeBinary, nullable=False),
)


# Of PostgreSQL's advisory locks: "dumont" in ASCII.
LOCK = 0x64756D6F6E74
MIGRATING = LOCK + 1
# A controller that is stopped in the middle of a transaction must not keep what it has locked.
SERVER_SETTINGS = {
    "application_name": "dumont-controller",
    "idle_in_transaction_session_timeout": "2000",
    "statement_timeout": "30000",
}
# Of SQLite's julianday.
UNIX_EPOCH = 2440587.5
# Finished operations that are kept.
OPERATIONS_KEPT = 1000


class SqlRegistry:
    """A registry that runs each call in a transaction of its own. ``open_registry`` makes it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._session = 0

    # Sessions

    async def join(self, decide: Decide, address: str, seconds: float) -> Established:
        async with self._transaction() as connection:
            if self._shared:
                # One after the other, or two new controllers would each found a fleet.
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            else:
                # Whoever has locked the file is the only controller.
                await connection.execute(sa.delete(SESSIONS))
            row = (await connection.execute(sa.select(CONTROLLER))).mappings().first()
            stored = Identity(row["id"], row["starts"]) if row is not None else None
            tables = (sa.select(sa.func.count()).select_from(table) for table in (DEPLOYMENTS, NODES))
            counts = [(await connection.execute(count)).scalar_one() for count in tables]
            established = decide(stored, not any(counts))
            await connection.execute(sa.delete(CONTROLLER))
            await connection.execute(
                sa.insert(CONTROLLER).values(
                    id=established.identity.id,
                    starts=established.identity.starts,
                    revision=row["revision"] + 1 if row is not None else 1,
                )
            )
            self._session = established.identity.starts
            await connection.execute(
                sa.insert(SESSIONS).values(
                    number=self._session, address=address, expire_time=self._now() + seconds
                )
            )
        await self._checkpoint()
        return established

    async def renew(self, seconds: float) -> None:
        change = (
            sa.update(SESSIONS)
            .where(SESSIONS.c.number == self._session)
            .values(expire_time=self._now() + seconds)
        )
        async with self._transaction() as connection:
            if (await connection.execute(change)).rowcount == 0:
                raise self._ended()

    async def end_expired(self) -> None:
        if not self._shared:
            return
        # One that is being renewed, or whose controller is writing, is passed over.
        expired = (
            sa.select(SESSIONS.c.number)
            .where(SESSIONS.c.expire_time <= self._now(), SESSIONS.c.number != self._session)
            .with_for_update(skip_locked=True)
        )
        async with self._transaction(writes=True) as connection:
            await connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.number.in_(expired)))

    async def leave(self) -> None:
        async with self._transaction() as connection:
            await connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.number == self._session))

    async def claim(self) -> frozenset[str]:
        living = sa.select(SESSIONS.c.number)
        change = (
            sa.update(DEPLOYMENTS)
            .where(DEPLOYMENTS.c.holder.not_in(living))
            .values(holder=self._session)
            .returning(DEPLOYMENTS.c.id)
        )
        unheld = sa.select(DEPLOYMENTS.c.id).where(DEPLOYMENTS.c.holder.not_in(living)).limit(1)
        async with self._transaction(writes=True) as connection:
            if (await connection.execute(unheld)).first() is None:
                return frozenset()
            if self._shared:
                # Nobody joins from here on: a session that this does not see yet may hold some already.
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            taken = frozenset((await connection.execute(change)).scalars())
            if taken:
                await self._revise(connection)
        return taken

    async def members(self) -> Members:
        async with self._transaction() as connection:
            return await self._members(connection)

    async def _members(self, connection: AsyncConnection) -> Members:
        # The sessions last: one that is not among them yet has a higher number than is read here.
        controller = (await connection.execute(sa.select(CONTROLLER))).mappings().first()
        sessions = (await connection.execute(sa.select(SESSIONS))).mappings().all()
        return Members(
            addresses={row["number"]: row["address"] for row in sessions},
            highest=controller["starts"] if controller is not None else 0,
            revision=controller["revision"] if controller is not None else 0,
        )

    # Facts

    async def load(self) -> Stored:
        async with self._transaction() as connection:
            members = await self._members(connection)
            deployments = (await connection.execute(sa.select(DEPLOYMENTS))).mappings().all()
            nodes = (await connection.execute(sa.select(NODES))).mappings().all()
            intents = (await connection.execute(sa.select(INTENTS))).mappings().all()
            captured = (await connection.execute(sa.select(CAPTURED))).mappings().all()
        return Stored(
            deployments=tuple(_deployment(row) for row in deployments),
            nodes=tuple(_node(row) for row in nodes),
            intents=tuple(Intent(**row) for row in intents),
            captured=tuple(Captured(**row) for row in captured),
            last_use={
                row["id"]: row["last_use_time"] for row in deployments if row["last_use_time"] is not None
            },
            holders={row["id"]: row["holder"] for row in deployments},
            members=members,
        )

    async def create_deployment(self, deployment: Deployment) -> Deployment:
        try:
            async with self._transaction(writes=True, revises=True) as connection:
                if (same := await self._requested(connection, deployment)) is not None:
                    return same
                await connection.execute(
                    sa.insert(DEPLOYMENTS).values(**_row(deployment), holder=self._session)
                )
        except IntegrityError as error:
            # Another controller may have answered the same request at this moment.
            async with self._transaction() as connection:
                if (same := await self._requested(connection, deployment)) is not None:
                    return same
            raise AlreadyExists(
                "DEPLOYMENT_EXISTS",
                f"deployments/{deployment.id} exists; choose another id, or update it",
                field="deployment_id",
                metadata={"deployment": f"deployments/{deployment.id}"},
            ) from error
        await self._checkpoint()
        return deployment

    async def _requested(self, connection: AsyncConnection, deployment: Deployment) -> Deployment | None:
        """What was stored for the same request; None: nothing, or it has no id."""
        if not deployment.request_id:
            return None
        same = sa.select(DEPLOYMENTS).where(DEPLOYMENTS.c.request_id == deployment.request_id)
        row = (await connection.execute(same)).mappings().first()
        return _deployment(row) if row is not None else None

    async def update_deployment(self, deployment: Deployment, etag: str) -> None:
        change = (
            sa.update(DEPLOYMENTS)
            .where(DEPLOYMENTS.c.id == deployment.id, DEPLOYMENTS.c.etag == etag)
            .values(_row(deployment))
        )
        async with self._transaction(writes=True, revises=True) as connection:
            if (await connection.execute(change)).rowcount == 0:
                raise Aborted(
                    "ETAG_MISMATCH",
                    f"deployments/{deployment.id} was changed meanwhile; read it again and repeat the change",
                    metadata={"deployment": f"deployments/{deployment.id}"},
                )
        await self._checkpoint()

    async def delete_deployment(self, deployment: str) -> None:
        async with self._transaction(writes=True, revises=True) as connection:
            await connection.execute(sa.delete(DEPLOYMENTS).where(DEPLOYMENTS.c.id == deployment))

    async def save_last_use(self, times: Mapping[str, float]) -> None:
        change = (
            sa.update(DEPLOYMENTS)
            .where(DEPLOYMENTS.c.id == sa.bindparam("key"))
            .values(last_use_time=sa.bindparam("time"))
        )
        async with self._transaction(writes=True) as connection:
            await connection.execute(change, [{"key": key, "time": time} for key, time in times.items()])

    async def save_node(self, node: Node) -> None:
        async with self._transaction(writes=True, revises=True) as connection:
            await self._put(connection, NODES, id=node.id, endpoint=node.endpoint, facts=_facts(node))

    async def save_intent(self, intent: Intent) -> None:
        async with self._transaction(writes=True) as connection:
            await connection.execute(
                sa.insert(INTENTS).values(
                    instance=intent.instance,
                    deployment=intent.deployment,
                    node=intent.node,
                    snapshot=intent.snapshot,
                    create_time=intent.create_time,
                )
            )

    async def drop_intents(self, instances: Iterable[str]) -> None:
        async with self._transaction(writes=True) as connection:
            for instance in instances:
                await connection.execute(sa.delete(INTENTS).where(INTENTS.c.instance == instance))

    async def save_captured(self, captured: Captured) -> None:
        async with self._transaction(writes=True, revises=True) as connection:
            await self._put(
                connection,
                CAPTURED,
                id=captured.id,
                deployment=captured.deployment,
                deployment_uid=captured.deployment_uid,
                manifest_digest=captured.manifest_digest,
                node=captured.node,
                adopt_time=captured.adopt_time,
            )
        await self._checkpoint()

    async def drop_captured(self, snapshot: str) -> None:
        async with self._transaction(writes=True, revises=True) as connection:
            await connection.execute(sa.delete(CAPTURED).where(CAPTURED.c.id == snapshot))

    # Operations

    async def save_operation(self, name: str, content: bytes, done: bool) -> None:
        row = {"session": self._session, "done": done, "update_time": self._now(), "content": content}
        kept = (
            sa.select(OPERATIONS.c.name)
            .where(OPERATIONS.c.done)
            .order_by(OPERATIONS.c.update_time.desc())
            .limit(OPERATIONS_KEPT)
        )
        async with self._transaction(writes=True) as connection:
            await self._put(connection, OPERATIONS, name=name, **row)
            if done:
                await connection.execute(
                    sa.delete(OPERATIONS).where(OPERATIONS.c.done, OPERATIONS.c.name.not_in(kept))
                )

    async def operation(self, name: str) -> StoredOperation | None:
        query = sa.select(OPERATIONS).where(OPERATIONS.c.name == name)
        async with self._transaction() as connection:
            row = (await connection.execute(query)).mappings().first()
        return StoredOperation(row["session"], row["done"], row["content"]) if row is not None else None

    async def drop_operation(self, name: str) -> None:
        async with self._transaction(writes=True) as connection:
            await connection.execute(sa.delete(OPERATIONS).where(OPERATIONS.c.name == name))

    async def close(self) -> None:
        await self._engine.dispose()

    @property
    def _shared(self) -> bool:
        """Whether several controllers may use this database."""
        return self._engine.dialect.name == "postgresql"

    def _now(self) -> sa.ColumnElement[Any]:
        """The database's clock."""
        if self._shared:
            return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)
        return (sa.func.julianday("now", type_=sa.Double) - UNIX_EPOCH) * 86400.0

    def _ended(self) -> Aborted:
        return Aborted(
            "SESSION_ENDED",
            f"session {self._session} of this controller has ended, because nobody heard of it for too long; "
            "another controller acts in its place; try again",
            metadata={"session": str(self._session)},
            retry_after=1.0,
        )

    async def _put(self, connection: AsyncConnection, table: sa.Table, **row: Any) -> None:
        """Insert a row, or replace the one with the same key, whoever else does so at the same time."""
        insert = (postgresql if self._shared else sqlite).insert(table).values(**row)
        replaced = {name: insert.excluded[name] for name in row}
        await connection.execute(
            insert.on_conflict_do_update(index_elements=table.primary_key, set_=replaced)
        )

    async def _revise(self, connection: AsyncConnection) -> None:
        await connection.execute(sa.update(CONTROLLER).values(revision=CONTROLLER.c.revision + 1))

    async def _checkpoint(self) -> None:
        """Move what was written from SQLite's log into its file, so that losing the log loses nothing."""
        if self._engine.dialect.name == "sqlite":
            async with _errors(), self._engine.connect() as connection:
                raw = await connection.get_raw_connection()
                assert raw.driver_connection is not None
                # Outside any transaction, and without waiting for readers; the next checkpoint does the rest.
                await raw.driver_connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    @asynccontextmanager
    async def _transaction(
        self, writes: bool = False, revises: bool = False
    ) -> AsyncIterator[AsyncConnection]:
        """Run a transaction.

        Args:
            writes: only while this controller's session lives, and it cannot end before the transaction does.
            revises: it changes what every controller must hear of.
        """
        with_errors = _errors()
        async with with_errors, self._engine.begin() as connection:
            if writes and self._session:
                mine = sa.select(SESSIONS.c.number).where(SESSIONS.c.number == self._session)
                # It can be renewed meanwhile, but not deleted.
                locked = mine.with_for_update(read=True, key_share=True)
                if (await connection.execute(locked)).first() is None:
                    raise self._ended()
            yield connection
            if revises:
                await self._revise(connection)


async def open_registry(url: str) -> SqlRegistry:
    """Connect, bring the schema up to date, and return the registry.

    Args:
        url: ``sqlite+aiosqlite:///PATH`` or ``postgresql+asyncpg://...``.

    Raises:
        Unavailable: DATABASE_UNAVAILABLE.
    """
    is_file = url.startswith("sqlite")
    engine = create_async_engine(
        url, pool_pre_ping=not is_file, connect_args={} if is_file else {"server_settings": SERVER_SETTINGS}
    )
    if engine.dialect.name == "sqlite":
        _tune_sqlite(engine)
    try:
        async with _errors(), engine.begin() as connection:
            await connection.run_sync(migrate)
    except BaseException:
        await engine.dispose()
        raise
    return SqlRegistry(engine)


def migrate(connection: sa.Connection, revision: str = "head", down: bool = False) -> None:
    """Run the revisions that the database lacks, up to ``revision``; ``down``: undo those after it."""
    if connection.dialect.name == "postgresql":
        # Two controllers that start at the same time would both run them.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATING)))
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    config.attributes["connection"] = connection
    (command.downgrade if down else command.upgrade)(config, revision)


def _tune_sqlite(engine: AsyncEngine) -> None:
    @sa.event.listens_for(engine.sync_engine, "connect")
    def connected(raw: Any, _: object) -> None:
        # The driver's own BEGIN comes too late and only for writes, so we begin transactions ourselves.
        raw.isolation_level = None
        cursor = raw.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # A transaction that reads first and writes later fails at once if another one is writing.
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@asynccontextmanager
async def _errors() -> AsyncIterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, OSError) as error:
        raise _unavailable(error) from error
    except DBAPIError as error:
        # SQLite raises the bare class for a file that is damaged or is not a database.
        if error.connection_invalidated or type(error) is DatabaseError:
            raise _unavailable(error) from error
        raise


def _unavailable(error: Exception) -> Unavailable:
    cause = getattr(error, "orig", None) or error
    return Unavailable(
        "DATABASE_UNAVAILABLE",
        f"the controller's database cannot be used now ({type(cause).__name__}: {str(cause)[:200]}); "
        "try again, or see its log; if it is damaged, restore it from a backup",
        retry_after=1.0,
    )


def _row(deployment: Deployment) -> dict[str, Any]:
    return {
        "id": deployment.id,
        "uid": deployment.uid,
        "model": deployment.model,
        "engine": deployment.engine,
        "start_mode": deployment.start_mode.value,
        "checkpoint_enabled": deployment.checkpoint.enabled,
        "checkpoint_ttl": deployment.checkpoint.ttl,
        "checkpoint_storage": deployment.checkpoint.storage.value,
        "checkpoint_weights": deployment.checkpoint.weights.value,
        "idle_timeout": deployment.idle_timeout,
        "park_timeout": deployment.park_timeout,
        "create_time": deployment.create_time,
        "update_time": deployment.update_time,
        "etag": deployment.etag,
        "deleting": deployment.deleting,
        "request_id": deployment.request_id or None,
        "priority": deployment.priority,
        "min_instances": deployment.min_instances,
        "max_instances": deployment.max_instances,
        "weights_bytes": deployment.weights_bytes,
        "engine_options": dict(deployment.engine_options),
    }


def _deployment(row: Mapping[Any, Any]) -> Deployment:
    return Deployment(
        id=row["id"],
        uid=row["uid"],
        model=row["model"],
        engine=row["engine"],
        start_mode=StartMode(row["start_mode"]),
        checkpoint=Checkpoint(
            row["checkpoint_enabled"],
            row["checkpoint_ttl"],
            Storage(row["checkpoint_storage"]),
            Weights(row["checkpoint_weights"]),
        ),
        idle_timeout=row["idle_timeout"],
        park_timeout=row["park_timeout"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        etag=row["etag"],
        deleting=row["deleting"],
        request_id=row["request_id"] or "",
        priority=row["priority"],
        min_instances=row["min_instances"],
        max_instances=row["max_instances"],
        weights_bytes=row["weights_bytes"],
        engine_options=row["engine_options"],
    )


def _facts(node: Node) -> dict[str, Any]:
    return {
        "version": node.version,
        "gpu_models": list(node.gpu_models),
        "memory_total_bytes": node.memory_total_bytes,
        "memory_available_bytes": node.memory_available_bytes,
        "cpu_count": node.cpu_count,
        "checkpoint_capable": node.checkpoint_capable,
        "findings": [[f.check, f.passed, f.message] for f in node.findings],
        "object_store": node.object_store,
        "snapshot_limit_bytes": node.snapshot_limit_bytes,
        "draining": node.draining,
        "gpus": [[g.uuid, g.model, g.total_bytes, g.free_bytes, g.other_bytes] for g in node.gpus],
        "instance_memory_limit_bytes": node.instance_memory_limit_bytes,
        "parked_memory_limit_bytes": node.parked_memory_limit_bytes,
        "weight_cache_limit_bytes": node.weight_cache_limit_bytes,
        "heartbeat_time": node.heartbeat_time,
        "engines": dict(node.engines),
    }


def _node(row: Mapping[Any, Any]) -> Node:
    facts = dict(row["facts"])
    facts["gpu_models"] = tuple(facts["gpu_models"])
    # Not in rows of earlier versions.
    facts["gpus"] = tuple(Gpu(*gpu) for gpu in facts.get("gpus", ()))
    facts["findings"] = tuple(Finding(*finding) for finding in facts["findings"])
    return Node(id=row["id"], endpoint=row["endpoint"], **facts)

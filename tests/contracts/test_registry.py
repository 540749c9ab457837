"""What every registry promises, in memory and on both databases."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from controller.adapters.registry_sql import METADATA, migrate, open_registry
from controller.identity import Identity
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
from controller.ports import Registry
from dumont.errors import Aborted, AlreadyExists, FailedPrecondition, Unavailable
from tests.fakes.memory_registry import MemoryRegistry
from tests.helpers.postgres import PostgresServer

Reopen = Callable[[], Awaitable[Registry]]


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database; each test that asks for it runs on both."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/controller.db"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return await server.new_database()


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Reopen]:
    """Open the registry; every call opens the same one again, as the next controller would."""
    opened: list[Registry] = []
    memory = MemoryRegistry()
    database = f"sqlite+aiosqlite:///{tmp_path}/controller.db"
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        database = await server.new_database()

    async def open_one() -> Registry:
        made = memory if request.param == "memory" else await open_registry(database)
        opened.append(made)
        return made

    yield open_one
    for registry in opened:
        await registry.close()


@pytest.fixture
async def registry(reopen: Reopen) -> Registry:
    return await reopen()


@asynccontextmanager
async def on(url: str) -> AsyncIterator[AsyncConnection]:
    """A transaction on a database that no registry has open."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        yield connection
    await engine.dispose()


def deployment(identifier: str = "qa", **changes: Any) -> Deployment:
    made = Deployment(
        id=identifier,
        uid=str(uuid.uuid4()),
        model="org/model",
        engine="causal_lm",
        start_mode=StartMode.CHECKPOINT,
        checkpoint=Checkpoint(True, 3600.5, Storage.S3, Weights.INCLUDED),
        idle_timeout=None,
        park_timeout=0.0,
        create_time=1_700_000_000.123456,
        update_time=1_700_000_001.0,
        etag="one",
        priority=-7,
        min_instances=0,
        max_instances=3,
        weights_bytes=1 << 40,
    )
    return replace(made, **changes)


async def test_a_new_registry_is_empty(registry: Registry) -> None:
    stored = await registry.load()
    assert (stored.deployments, stored.nodes, stored.intents, dict(stored.last_use or {})) == ((), (), (), {})


async def test_what_was_stored_is_there_for_the_next_controller(registry: Registry, reopen: Reopen) -> None:
    node = Node(
        "n1",
        "unix:/run/n1.sock",
        version="1",
        gpu_models=("H100",),
        memory_total_bytes=1 << 40,
        checkpoint_capable=True,
        findings=(Finding("criu", True, "4.1"),),
        heartbeat_time=5.5,
        object_store="s3://bucket/prefix",
        draining=True,
        gpus=(Gpu("GPU-a", "H100", 80 << 30, 70 << 30, 1 << 30),),
        instance_memory_limit_bytes=1 << 39,
        parked_memory_limit_bytes=1 << 38,
        weight_cache_limit_bytes=1 << 37,
    )
    intent = Intent("qa-1", "qa", "n1", "", 7.25)
    await registry.create_deployment(deployment())
    await registry.save_node(node)
    await registry.save_intent(intent)
    await registry.save_last_use({"qa": 12.5})

    stored = await (await reopen()).load()

    assert [replace(d, uid="") for d in stored.deployments] == [deployment(uid="")]
    assert stored.nodes == (node,)
    assert stored.intents == (intent,)
    assert stored.last_use == {"qa": 12.5}


async def test_an_id_is_taken_once(registry: Registry) -> None:
    first = await registry.create_deployment(deployment(request_id=str(uuid.uuid4())))
    for second in (deployment(), deployment(request_id=str(uuid.uuid4()))):
        with pytest.raises(AlreadyExists) as failure:
            await registry.create_deployment(second)
        assert (failure.value.reason, failure.value.field) == ("DEPLOYMENT_EXISTS", "deployment_id")
    assert (await registry.load()).deployments == (first,)


async def test_a_repeated_request_returns_what_it_stored_first(registry: Registry) -> None:
    request_id = str(uuid.uuid4())
    first = await registry.create_deployment(deployment(request_id=request_id))
    again = await registry.create_deployment(deployment("other", request_id=request_id))
    assert again == first
    assert (await registry.load()).deployments == (first,)


async def test_many_deployments_need_no_request_id(registry: Registry) -> None:
    for identifier in ("a", "b", "c"):
        await registry.create_deployment(deployment(identifier))
    assert {d.id for d in (await registry.load()).deployments} == {"a", "b", "c"}


async def test_an_update_needs_the_etag_that_is_stored(registry: Registry) -> None:
    await registry.create_deployment(deployment(uid="u"))
    changed = deployment(uid="u", etag="two", deleting=True, idle_timeout=1.5)
    await registry.update_deployment(changed, "one")
    for stale in (changed, deployment("gone")):
        with pytest.raises(Aborted) as failure:
            await registry.update_deployment(stale, "one")
        assert failure.value.reason == "ETAG_MISMATCH"
    assert (await registry.load()).deployments == (changed,)


async def test_an_update_keeps_the_last_use(registry: Registry) -> None:
    await registry.create_deployment(deployment())
    await registry.save_last_use({"qa": 3.0})
    await registry.update_deployment(deployment(etag="two"), "one")
    assert (await registry.load()).last_use == {"qa": 3.0}


async def test_a_deleted_deployment_leaves_nothing_and_may_come_again(registry: Registry) -> None:
    await registry.create_deployment(deployment())
    await registry.save_last_use({"qa": 3.0})
    await registry.delete_deployment("qa")
    await registry.delete_deployment("qa")
    stored = await registry.load()
    assert (stored.deployments, dict(stored.last_use or {})) == ((), {})
    await registry.create_deployment(deployment())
    assert dict((await registry.load()).last_use or {}) == {}


async def test_the_last_use_of_a_stranger_is_ignored(registry: Registry) -> None:
    await registry.create_deployment(deployment())
    await registry.save_last_use({"qa": 1.0, "gone": 2.0})
    await registry.save_last_use({"qa": 4.0})
    assert (await registry.load()).last_use == {"qa": 4.0}


async def test_a_node_is_replaced_and_an_intent_dropped_once(registry: Registry) -> None:
    await registry.save_node(Node("n1", "a:1"))
    await registry.save_node(Node("n1", "b:2"))
    await registry.save_intent(Intent("i", "qa", "n1", "s", 1.0))
    await registry.drop_intents(["i"])
    await registry.drop_intents(["i"])
    stored = await registry.load()
    assert [node.endpoint for node in stored.nodes] == ["b:2"]
    assert stored.intents == ()


async def test_a_captured_snapshot_is_remembered_with_its_digest_until_it_is_dropped(
    registry: Registry, reopen: Reopen
) -> None:
    await registry.save_captured(Captured("s1", "qa", "u", ""))
    await registry.save_captured(Captured("s1", "qa", "u", "newer", "n1", 5.5))
    await registry.save_captured(Captured("s2", "qa", "", "other"))
    assert set((await (await reopen()).load()).captured) == {
        Captured("s1", "qa", "u", "newer", "n1", 5.5),
        Captured("s2", "qa", "", "other"),
    }
    for _ in range(2):
        await registry.drop_captured("s1")
    assert [captured.id for captured in (await registry.load()).captured] == ["s2"]


@pytest.mark.parametrize(
    "url", ["postgresql+asyncpg://127.0.0.1:1/none", "sqlite+aiosqlite:///{folder}/damaged.db"]
)
async def test_a_database_that_cannot_be_used_is_unavailable(tmp_path: Path, url: str) -> None:
    (tmp_path / "damaged.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(Unavailable) as failure:
        await open_registry(url.format(folder=tmp_path))
    assert failure.value.reason == "DATABASE_UNAVAILABLE"
    assert failure.value.retry_after


async def test_the_migrated_schema_is_the_one_the_code_uses(url: str) -> None:
    await (await open_registry(url)).close()
    async with on(url) as connection:
        found = await connection.run_sync(
            lambda sync: {
                table: {column["name"]: column["nullable"] for column in sa.inspect(sync).get_columns(table)}
                for table in METADATA.tables
            }
        )
    assert found == {
        name: {column.name: column.nullable for column in table.columns}
        for name, table in METADATA.tables.items()
    }


async def test_sqlite_writes_ahead(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/c.db"
    await (await open_registry(url)).close()
    async with on(url) as connection:
        assert (await connection.execute(sa.text("PRAGMA journal_mode"))).scalar() == "wal"


async def test_a_second_controller_on_a_server_s_database_is_told_who_has_it(postgres_url: str) -> None:
    first, second = await open_registry(postgres_url), await open_registry(postgres_url)
    await first.lock("10.0.0.1:7070")
    with pytest.raises(FailedPrecondition) as refusal:
        await second.lock("10.0.0.2:7070")
    assert refusal.value.reason == "STATE_IN_USE"
    assert "dumont-controller on 10.0.0.1:7070, from this machine" in refusal.value.message
    await first.close()
    await second.lock("10.0.0.2:7070")
    await second.close()


# What a controller of the first version left behind.
FIRST = """
INSERT INTO deployments VALUES ('qa', 'its uid', 'org/model', 'causal_lm', 'checkpoint', true, 3600.5,
  NULL, 0.0, 1.5, 2.5, 12.5, 'one', false, NULL);
INSERT INTO nodes VALUES ('n1', 'a:1', '{"version": "1", "gpu_models": ["H100"], "findings": []}');
INSERT INTO intents VALUES ('qa-1', 'qa', 'n1', '', 7.25)
"""
# And of the second, which recorded captures.
SECOND = """
INSERT INTO captured VALUES ('s1', 'qa', 'd');
INSERT INTO captured VALUES ('s2', 'gone', 'd')
"""


async def test_what_the_first_version_stored_is_read_by_this_one(url: str) -> None:
    """Captures of deployments that are gone become orphans, which nobody deletes."""
    async with on(url) as connection:
        for revision, left in (("0001", FIRST), ("0002", SECOND)):
            await connection.run_sync(migrate, revision)
            for statement in left.split(";"):
                await connection.exec_driver_sql(statement)

    registry = await open_registry(url)

    stored = await registry.load()
    (found,) = stored.deployments
    assert found == Deployment(
        id="qa",
        uid="its uid",
        model="org/model",
        engine="causal_lm",
        start_mode=StartMode.CHECKPOINT,
        checkpoint=Checkpoint(True, 3600.5, Storage.LOCAL, Weights.DETACHED),
        idle_timeout=None,
        park_timeout=0.0,
        create_time=1.5,
        update_time=2.5,
        etag="one",
    )
    assert stored.nodes == (Node("n1", "a:1", version="1", gpu_models=("H100",)),)
    assert stored.intents == (Intent("qa-1", "qa", "n1", "", 7.25),)
    assert stored.captured == (Captured("s1", "qa", "its uid", "d"),)
    assert stored.last_use == {"qa": 12.5}
    assert await registry.identity() is None
    await registry.close()


async def test_revisions_can_be_undone_and_done_again(url: str) -> None:
    await (await open_registry(url)).close()
    async with on(url) as connection:
        await connection.run_sync(migrate, "0001", down=True)
        for statement in FIRST.split(";"):
            await connection.exec_driver_sql(statement)
    registry = await open_registry(url)
    assert [found.id for found in (await registry.load()).deployments] == ["qa"]
    await registry.close()


async def test_whose_database_it_is_is_remembered(registry: Registry, reopen: Reopen) -> None:
    assert await registry.identity() is None
    for starts in (1, 2):
        await registry.save_identity(Identity("me", starts))
        assert await (await reopen()).identity() == Identity("me", starts)

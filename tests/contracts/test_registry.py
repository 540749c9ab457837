"""What every registry promises, in memory and on both databases."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from controller.adapters.clock import SystemClock
from controller.adapters.registry_sql import METADATA, migrate, open_registry
from controller.identity import Established, Identity
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
from controller.ports import Registry, StoredOperation
from dumont.errors import Aborted, AlreadyExists, FailedPrecondition, Unavailable
from tests.fakes.memory_registry import MemoryDatabase, MemoryRegistry
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


def start(stored: Identity | None, empty: bool) -> Established:
    """What a controller decides that accepts any database."""
    return Established(Identity("fleet", (stored.starts if stored else 0) + 1))


async def test_every_start_of_a_controller_has_a_session_of_its_own(reopen: Reopen) -> None:
    asked: list[tuple[Identity | None, bool]] = []

    def decide(stored: Identity | None, empty: bool) -> Established:
        asked.append((stored, empty))
        return start(stored, empty)

    first = await reopen()
    await first.join(decide, "a:1", 10.0)
    await first.create_deployment(deployment())
    await (await reopen()).join(decide, "b:1", 10.0)
    assert asked == [(None, True), (Identity("fleet", 1), False)]


async def test_a_start_that_is_refused_changes_nothing(reopen: Reopen) -> None:
    def refuse(stored: Identity | None, empty: bool) -> Established:
        raise FailedPrecondition("DATABASE_FOREIGN", "it is not ours")

    registry = await reopen()
    await registry.join(start, "a:1", 10.0)
    with pytest.raises(FailedPrecondition):
        await (await reopen()).join(refuse, "b:1", 10.0)
    members = await registry.members()
    assert (members.highest, dict(members.addresses)) == (1, {1: "a:1"})


async def test_the_only_controller_takes_over_what_the_last_one_held(reopen: Reopen) -> None:
    first = await reopen()
    await first.join(start, "a:1", 10.0)
    await first.create_deployment(deployment())
    await first.leave()
    second = await reopen()
    await second.join(start, "b:1", 10.0)
    assert await second.claim() == {"qa"}
    assert await second.claim() == frozenset()
    stored = await second.load()
    assert (stored.holders, dict(stored.members.addresses)) == ({"qa": 2}, {2: "b:1"})


async def test_whoever_must_hear_of_a_change_sees_another_revision(registry: Registry) -> None:
    await registry.join(start, "a:1", 10.0)

    async def revises(work: Awaitable[object]) -> bool:
        before = (await registry.members()).revision
        await work
        return (await registry.members()).revision != before

    assert await revises(registry.create_deployment(deployment()))
    assert await revises(registry.update_deployment(deployment(etag="two"), "one"))
    assert await revises(registry.save_node(Node("n1", "a:1")))
    assert await revises(registry.save_captured(Captured("s1", "qa", "u", "")))
    assert await revises(registry.drop_captured("s1"))
    assert not await revises(registry.save_last_use({"qa": 1.0}))
    assert not await revises(registry.renew(10.0))
    assert not await revises(registry.claim())
    assert await revises(registry.delete_deployment("qa"))


async def test_operations_outlive_the_controller_that_runs_them(reopen: Reopen) -> None:
    first = await reopen()
    await first.join(start, "a:1", 10.0)
    await first.save_operation("operations/x", b"running", False)
    await first.save_operation("operations/x", b"done", True)
    second = await reopen()
    assert await second.operation("operations/x") == StoredOperation(1, True, b"done")
    assert await second.operation("operations/y") is None
    await second.drop_operation("operations/x")
    assert await second.operation("operations/x") is None


# Several controllers


@pytest.fixture(params=["memory", "postgresql"])
async def shared(request: pytest.FixtureRequest) -> AsyncIterator[Reopen]:
    """Open one more registry of a database that several controllers share."""
    opened: list[Registry] = []
    memory = MemoryDatabase(SystemClock())
    url = ""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = await server.new_database()

    async def open_one() -> Registry:
        opened.append(await open_registry(url) if url else MemoryRegistry(memory))
        return opened[-1]

    yield open_one
    for registry in opened:
        await registry.close()


async def ended(registry: Registry) -> bool:
    """Whether its session has ended, as every write then says."""
    try:
        await registry.save_intent(Intent(str(uuid.uuid4()), "qa", "n1", "", 1.0))
    except Aborted as error:
        return error.reason == "SESSION_ENDED"
    return False


async def test_controllers_that_start_at_the_same_time_are_one_fleet(shared: Reopen) -> None:
    registries = await asyncio.gather(*(shared() for _ in range(5)))
    await asyncio.gather(*(r.join(start, f"a:{n}", 10.0) for n, r in enumerate(registries)))
    members = await registries[0].members()
    assert (members.highest, set(members.addresses)) == (5, {1, 2, 3, 4, 5})


async def test_a_deployment_has_one_holder_until_its_session_ends(shared: Reopen) -> None:
    # given: two controllers, one of which made a deployment
    first, second = await shared(), await shared()
    await first.join(start, "a:1", 0.0)
    await second.join(start, "b:1", 10.0)
    await first.create_deployment(deployment())
    assert await second.claim() == frozenset()
    # when: its time is up, and nobody has noticed
    assert not await ended(first)
    await first.renew(0.0)
    # then: it goes on, until somebody does
    await second.end_expired()
    assert await ended(first)
    with pytest.raises(Aborted):
        await first.renew(10.0)
    assert await second.claim() == {"qa"}
    assert not await ended(second)


async def test_a_session_that_was_renewed_is_not_ended(shared: Reopen) -> None:
    first, second = await shared(), await shared()
    await first.join(start, "a:1", 0.0)
    await second.join(start, "b:1", 0.0)
    await first.renew(10.0)
    await second.end_expired()
    await second.end_expired()
    assert not await ended(first)
    # One does not end itself.
    assert not await ended(second)


async def test_only_one_of_those_who_reach_for_a_deployment_gets_it(shared: Reopen) -> None:
    first, *others = [await shared() for _ in range(5)]
    await first.join(start, "a:1", 0.0)
    for number in range(20):
        await first.create_deployment(deployment(f"d{number}"))
    for registry in others:
        await registry.join(start, "b:1", 10.0)
    await asyncio.gather(*(registry.end_expired() for registry in others))
    taken = await asyncio.gather(*(registry.claim() for registry in others))
    assert sorted(name for names in taken for name in names) == sorted(f"d{n}" for n in range(20))


async def test_a_write_under_way_is_finished_before_its_session_ends(postgres_url: str) -> None:
    """Or a successor would not see what was written, and the paused controller would believe that it was."""
    first, second = await open_registry(postgres_url), await open_registry(postgres_url)
    await first.join(start, "a:1", 0.0)
    await second.join(start, "b:1", 10.0)
    async with first._transaction(writes=True):
        await second.end_expired()
        assert 1 in (await second.members()).addresses
    await second.end_expired()
    assert 1 not in (await second.members()).addresses
    for registry in (first, second):
        await registry.close()


async def test_a_controller_that_stops_in_the_middle_of_a_write_is_cut_off(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout = {"idle_in_transaction_session_timeout": "50"}
    monkeypatch.setattr("controller.adapters.registry_sql.SERVER_SETTINGS", timeout)
    first, second = await open_registry(postgres_url), await open_registry(postgres_url)
    await first.join(start, "a:1", 0.0)
    await second.join(start, "b:1", 10.0)

    async def stop_and_go_on() -> None:
        async with first._transaction(writes=True) as connection:
            while 1 in (await second.members()).addresses:
                await second.end_expired()
            await connection.execute(sa.select(sa.literal(1)))

    with pytest.raises(Unavailable):
        await stop_and_go_on()
    for registry in (first, second):
        await registry.close()


async def test_a_node_may_register_with_every_controller_at_the_same_moment(shared: Reopen) -> None:
    registries = [await shared() for _ in range(4)]
    for registry in registries:
        await registry.join(start, "a:1", 10.0)
    for number in range(10):
        node = Node(f"n{number}", "n:7071")
        await asyncio.gather(*(registry.save_node(node) for registry in registries))
    assert {node.id for node in (await registries[0].load()).nodes} == {f"n{n}" for n in range(10)}


async def test_a_request_repeated_at_another_controller_returns_what_the_first_stored(shared: Reopen) -> None:
    registries = [await shared() for _ in range(4)]
    for registry in registries:
        await registry.join(start, "a:1", 10.0)
    for number in range(10):
        wanted = deployment(f"d{number}", request_id=str(uuid.uuid4()))
        made = await asyncio.gather(
            *(r.create_deployment(replace(wanted, uid=f"u{n}")) for n, r in enumerate(registries))
        )
        assert len({one.uid for one in made}) == 1

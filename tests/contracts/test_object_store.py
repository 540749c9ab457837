"""What every ObjectStore promises: in memory, in a directory, in a bucket of a real server."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest

from dumont.errors import AlreadyExists, DataLoss, NotFound
from dumont.names import new_id
from snapshotd.adapters.object_store.directory import DirectoryObjects
from snapshotd.adapters.object_store.s3 import S3Objects, S3Settings
from snapshotd.repository.model import CHUNK
from snapshotd.repository.ports import BytesLike, ObjectStore
from snapshotd.repository.repository import check_conditional_create
from tests.helpers.s3_server import S3Server
from tests.unit.snapshotd.repository.world import (
    MemoryObjects,
    WallClock,
    a_node,
    a_signer,
    an_image,
    contents,
    in_a_thread,
    noise,
)

T = TypeVar("T")


@pytest.fixture(params=["memory", "directory", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "memory":
        yield MemoryObjects(WallClock())
    elif request.param == "directory":
        yield DirectoryObjects(tmp_path / "objects")
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        url = f"s3://{server.bucket}/{new_id('contract')}/deeper"
        store = S3Objects(
            S3Settings.from_url(url, server.endpoint, server.access_key, server.secret_key), connections=8
        )
        yield store
        store.close()


async def keys(objects: ObjectStore, prefix: str) -> set[str]:
    return {item.key async for item in objects.list(prefix)}


@pytest.mark.parametrize("size", [0, 1, CHUNK + 29, 3 * CHUNK])
async def test_what_was_put_is_got(objects: ObjectStore, size: int) -> None:
    data = noise(size)
    await objects.put("chunks/ab/x", data)
    assert await objects.get("chunks/ab/x", size) == data
    found = await objects.stat("chunks/ab/x")
    assert found is not None
    assert (found.key, found.size) == ("chunks/ab/x", size)
    assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=1)


async def test_a_put_replaces(objects: ObjectStore) -> None:
    await objects.put("a", b"first")
    await objects.put("a", b"other")
    assert await objects.get("a", 10) == b"other"
    assert await keys(objects, "") == {"a"}


async def test_what_is_not_there_is_not_found(objects: ObjectStore) -> None:
    assert await objects.stat("chunks/no/no") is None
    with pytest.raises(NotFound):
        await objects.get("chunks/no/no", 10)
    await objects.delete("chunks/no/no")


async def test_no_more_than_the_limit_is_read(objects: ObjectStore) -> None:
    await objects.put("a", bytes(100))
    with pytest.raises(DataLoss):
        await objects.get("a", 99)


async def test_what_is_read_is_used_in_the_thread_that_waited_for_it(objects: ObjectStore) -> None:
    await objects.put("a", b"some bytes")
    threads: list[threading.Thread] = []

    def use(stored: BytesLike) -> bytes:
        threads.append(threading.current_thread())
        return bytes(stored).upper()

    def run(work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.wrap_future(one.submit(work))

    with ThreadPoolExecutor(1, thread_name_prefix="chosen") as one:
        assert await objects.read("a", 10, use, run) == b"SOME BYTES"
    assert [thread.name for thread in threads] == ["chosen_0"]
    with pytest.raises(DataLoss):
        await objects.read("a", 9, use, in_a_thread)
    with pytest.raises(NotFound):
        await objects.read("b", 9, use, in_a_thread)
    assert len(threads) == 1


async def test_what_fails_while_it_is_used_is_not_the_store_s_fault(objects: ObjectStore) -> None:
    await objects.put("a", b"x")
    uses: list[BytesLike] = []

    def fail(stored: BytesLike) -> None:
        uses.append(stored)
        raise OSError(errno.EIO, "no disk")

    with pytest.raises(OSError, match="no disk"):
        await objects.read("a", 1, fail, in_a_thread)
    assert len(uses) == 1


async def test_create_never_replaces(objects: ObjectStore) -> None:
    await objects.create("snapshots/a/manifest", b"first")
    with pytest.raises(AlreadyExists):
        await objects.create("snapshots/a/manifest", b"other")
    assert await objects.get("snapshots/a/manifest", 10) == b"first"


async def test_a_name_is_free_again_after_its_deletion(objects: ObjectStore) -> None:
    await objects.create("a", b"first")
    await objects.delete("a")
    assert await objects.stat("a") is None
    await objects.create("a", b"other")
    assert await objects.get("a", 10) == b"other"


async def test_of_eight_creators_exactly_one_wins(objects: ObjectStore) -> None:
    for round_number in range(5):
        key = f"races/{round_number}"
        outcomes = await asyncio.gather(
            *(objects.create(key, b"%d" % writer) for writer in range(8)), return_exceptions=True
        )
        winners = [writer for writer, outcome in enumerate(outcomes) if outcome is None]
        assert len(winners) == 1
        assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 7
        assert await objects.get(key, 10) == b"%d" % winners[0]


async def test_a_list_is_of_one_prefix_and_tells_sizes(objects: ObjectStore) -> None:
    for key, size in {
        "chunks/ab/1": 1,
        "chunks/ab/2": 2,
        "chunks/cd/3": 3,
        "snapshots/a/manifest": 4,
    }.items():
        await objects.put(key, bytes(size))
    assert {item.key: item.size async for item in objects.list("chunks/")} == {
        "chunks/ab/1": 1,
        "chunks/ab/2": 2,
        "chunks/cd/3": 3,
    }
    assert await keys(objects, "chunks/ab/") == {"chunks/ab/1", "chunks/ab/2"}
    assert await keys(objects, "none/") == set()
    assert len(await keys(objects, "")) == 4


async def test_a_list_longer_than_a_page_is_whole(
    objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapshotd.adapters.object_store.s3.LIST_PAGE", 7)
    names = {f"chunks/{number % 5}/{number:03}" for number in range(31)}
    await asyncio.gather(*(objects.put(key, b"x") for key in names))
    listed = [item.key async for item in objects.list("chunks/")]
    assert sorted(listed) == sorted(names)


async def test_conditional_create_is_proven_and_leaves_nothing(objects: ObjectStore) -> None:
    await check_conditional_create(objects)
    assert await keys(objects, "") == set()


async def test_a_snapshot_goes_through_it_and_is_collected(objects: ObjectStore, tmp_path: Path) -> None:
    content = {"inventory.img": b"i" * 100, "pages-1.img": noise(2 * CHUNK + 5) + bytes(2 * CHUNK)}
    signer = a_signer()
    source = a_node(objects, signer, grace=timedelta(0))
    published = await source.publish(an_image(tmp_path / "images", content=content), tmp_path / "images")

    reader = a_node(objects, trusts=(signer,))
    assert await reader.list() == [published]
    (tmp_path / "into").mkdir()
    await reader.fetch(await reader.get("s1"), tmp_path / "into")
    assert contents(tmp_path / "into") == content
    assert (await source.prune(await source.plan_prune(after_now()))).deleted == 0

    await source.delete("s1")
    await source.prune(await source.plan_prune(after_now()))
    assert await keys(objects, "") == set()


async def test_of_eight_nodes_that_publish_one_name_exactly_one_wins(
    objects: ObjectStore, tmp_path: Path
) -> None:
    nodes = [a_node(objects) for _ in range(8)]
    images = [tmp_path / str(number) for number in range(8)]
    manifests = [
        an_image(folder, content={"a.img": noise(1000, number)}) for number, folder in enumerate(images)
    ]
    outcomes = await asyncio.gather(
        *(
            node.publish(manifest, folder)
            for node, manifest, folder in zip(nodes, manifests, images, strict=True)
        ),
        return_exceptions=True,
    )
    losers = [outcome for outcome in outcomes if isinstance(outcome, AlreadyExists)]
    assert len(losers) == 7
    (winner,) = [number for number, outcome in enumerate(outcomes) if not isinstance(outcome, BaseException)]
    found = await nodes[winner].get("s1")
    (tmp_path / "into").mkdir()
    await nodes[winner].fetch(found, tmp_path / "into")
    assert contents(tmp_path / "into") == {"a.img": noise(1000, winner)}


def after_now() -> datetime:
    """Later than the age of anything in the store, whose clock counts whole seconds."""
    return datetime.now(UTC) + timedelta(seconds=5)

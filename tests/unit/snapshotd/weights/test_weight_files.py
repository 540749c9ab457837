"""Weight files in memory: read once, kept while used, gone when others need the room, never half there."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshotd.model import Model
from snapshotd.weights.cache import WeightCache, occupied
from snapshotd.weights.copying import PIECE, copy
from snapshotd.weights.files import NodeWeightFiles
from snapshotd.weights.mount import HUGE_PAGE

FILE = HUGE_PAGE


class GatedCache(WeightCache):
    """On a directory like any other; a copy waits for ``gate``, and fails with ``failure`` when half done."""

    def __init__(self, directory: Path, budget: int) -> None:
        directory.mkdir(exist_ok=True)
        super().__init__(directory, budget, threads=2, now=itertools.count(1.0).__next__)
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: OSError | None = None
        self.copies: list[str] = []
        self.read()

    async def _copy(self, source: Path, partial: Path) -> str:
        self.copies.append(f"{source.parent.name}/{source.name}")
        await self.gate.wait()
        if self.failure is not None:
            partial.write_bytes(b"half")
            raise self.failure
        return await super()._copy(source, partial)

    def names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


@pytest.fixture
def cache(tmp_path: Path) -> GatedCache:
    """Room for two files."""
    return GatedCache(tmp_path / "weights", 2 * FILE)


@pytest.fixture
def files(tmp_path: Path, cache: GatedCache) -> NodeWeightFiles:
    return NodeWeightFiles(tmp_path / "weights.json", cache)


def a_model(folder: Path, *contents: bytes) -> Model:
    """A model with one weight file for each of ``contents``."""
    folder.mkdir(exist_ok=True)
    paths = tuple(folder / f"model-{number}.safetensors" for number in range(len(contents)))
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return Model(folder.name, "causal_lm", folder, paths, sum(map(len, contents)), 512)


def digest_of(content: bytes) -> str:
    return str(blake3(content).hexdigest())


# One copy


@pytest.mark.parametrize("size", [1, 4096, PIECE, PIECE + 1, 3 * PIECE + 12345])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_copy_is_the_file_and_has_its_digest(tmp_path: Path, size: int, threads: int) -> None:
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)

    digest = copy(tmp_path / "source", tmp_path / "target", threads)

    assert digest == digest_of(content)
    assert (tmp_path / "target").read_bytes() == content


# What is held


async def test_files_are_held_under_their_digests(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    model = a_model(tmp_path / "one", b"first", b"second")

    held = await files.pin("i-1", model)

    assert held == {
        "model-0.safetensors": digest_of(b"first"),
        "model-1.safetensors": digest_of(b"second"),
    }
    assert cache.names() == set(held.values())
    assert (cache.directory / held["model-0.safetensors"]).read_bytes() == b"first"


async def test_what_is_there_is_not_filled_again(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    model = a_model(tmp_path / "one", b"first")
    first = await files.pin("i-1", model)
    files.unpin("i-1")

    assert await files.pin("i-2", model) == first
    assert cache.copies == ["one/model-0.safetensors"]


async def test_instances_that_come_at_once_wait_for_one_fill(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    model = a_model(tmp_path / "one", b"first", b"second")
    cache.gate.clear()
    waiting = [asyncio.create_task(files.pin(f"i-{number}", model)) for number in range(3)]
    digest = asyncio.create_task(files.digest(model))
    await turns()
    cache.gate.set()

    one, *others = await asyncio.gather(*waiting)

    assert others == [one, one]
    assert len(cache.copies) == 2
    # The digest took no reading of its own.
    assert await digest == await NodeWeightFiles(tmp_path / "fresh.json", None).digest(model)


async def test_the_one_used_longest_ago_leaves_for_another(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    for name in ("one", "two"):
        await files.pin(name, a_model(tmp_path / name, name.encode()))
        files.unpin(name)
    await files.pin("again", a_model(tmp_path / "one", b"one"))
    files.unpin("again")

    await files.pin("three", a_model(tmp_path / "three", b"three"))

    assert cache.names() == {digest_of(b"one"), digest_of(b"three")}


async def test_what_an_instance_holds_stays_and_the_newcomer_reads_its_own_files(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    await files.pin("i-1", a_model(tmp_path / "one", b"one", b"more"))

    assert await files.pin("i-2", a_model(tmp_path / "two", b"two")) == {}
    assert cache.names() == {digest_of(b"one"), digest_of(b"more")}

    files.unpin("i-1")
    assert await files.pin("i-2", a_model(tmp_path / "two", b"two"))


async def test_a_model_is_held_whole_or_not_at_all(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    await files.pin("i-1", a_model(tmp_path / "one", b"one"))

    # One of its files is there, for the other two there is no room.
    assert await files.pin("i-2", a_model(tmp_path / "two", b"one", b"two", b"three")) == {}

    files.unpin("i-1")
    # Nothing of it was kept, so both places are free.
    assert await files.pin("i-3", a_model(tmp_path / "four", b"four", b"five"))


async def test_files_on_their_way_count_against_the_budget(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    cache.gate.clear()
    coming = asyncio.create_task(files.pin("i-1", a_model(tmp_path / "one", b"one", b"more")))
    await turns()

    assert await files.pin("i-2", a_model(tmp_path / "two", b"two")) == {}

    cache.gate.set()
    assert await coming


async def test_the_same_bytes_in_another_directory_need_no_room(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    first = await files.pin("i-1", a_model(tmp_path / "one", b"one", b"more"))

    assert await files.pin("i-2", a_model(tmp_path / "copy", b"one", b"more")) == first


async def test_names_that_lead_to_one_file_share_one_fill_and_its_room(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    # given: room for two files, and three names, two of them links to one blob
    blob = tmp_path / "blob"
    blob.write_bytes(b"first")
    model = a_model(tmp_path / "one", b"", b"", b"second")
    for link in model.weights[:2]:
        link.unlink()
        link.symlink_to(blob)

    held = await files.pin("i-1", model)

    assert held == {
        "model-0.safetensors": digest_of(b"first"),
        "model-1.safetensors": digest_of(b"first"),
        "model-2.safetensors": digest_of(b"second"),
    }
    assert len(cache.copies) == 2


# What goes wrong


async def test_a_partial_file_of_an_earlier_daemon_is_not_trusted(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    held = await files.pin("i-1", a_model(tmp_path / "one", b"one"))
    (cache.directory / ".partial-1").write_bytes(b"half")
    (cache.directory / f".evicted-{digest_of(b'old')}").write_bytes(b"old")

    again = GatedCache(cache.directory, cache.budget)

    assert again.names() == set(held.values())
    assert again.pin("i-1", held["model-0.safetensors"])


async def test_a_fill_that_fails_leaves_nothing_and_can_be_tried_again(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    model = a_model(tmp_path / "one", b"one")
    cache.failure = OSError(errno.EIO, "the disk is broken")
    with pytest.raises(OSError, match="broken"):
        await files.pin("i-1", model)
    assert cache.names() == set()
    cache.failure = None

    assert await files.pin("i-1", model)


async def test_without_memory_for_the_budget_a_model_reads_its_own_files(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    cache.failure = OSError(errno.ENOSPC, "no space left on device")

    assert await files.pin("i-1", a_model(tmp_path / "one", b"one", b"more")) == {}

    cache.failure = None
    # Neither room nor a hold was lost.
    assert await files.pin("i-2", a_model(tmp_path / "two", b"two", b"three"))


async def test_a_caller_who_leaves_holds_nothing_and_others_get_theirs(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    model = a_model(tmp_path / "one", b"one", b"more")
    cache.gate.clear()
    leaving, staying = (asyncio.create_task(files.pin(name, model)) for name in ("leaver", "stayer"))
    await turns()
    leaving.cancel()
    await asyncio.wait([leaving])
    cache.gate.set()

    assert await staying
    files.unpin("stayer")
    # then: nobody keeps it from leaving
    assert await files.pin("i-2", a_model(tmp_path / "two", b"two", b"three"))


async def test_bytes_that_changed_behind_the_file_systems_back_are_told(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    # given: a digest that is remembered for a file with other bytes by now
    model = a_model(tmp_path / "one", b"before")
    digest = await files.digest(model)
    known = json.loads((tmp_path / "weights.json").read_text())
    status = model.weights[0].stat()
    with model.weights[0].open("r+b") as file:
        file.write(b"after!")
    os.utime(model.weights[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert known == json.loads((tmp_path / "weights.json").read_text())

    held = await files.pin("i-1", model)

    assert held == {"model-0.safetensors": digest_of(b"after!")}
    assert await files.digest(model) != digest


async def test_what_an_earlier_daemons_instances_hold_stays(
    tmp_path: Path, cache: GatedCache, files: NodeWeightFiles
) -> None:
    held = await files.pin("i-1", a_model(tmp_path / "one", b"one"))
    next_cache = GatedCache(cache.directory, FILE)
    next_files = NodeWeightFiles(tmp_path / "weights.json", next_cache)

    next_files.repin("i-1", {**held, "gone.safetensors": digest_of(b"gone")})

    assert await next_files.pin("i-2", a_model(tmp_path / "two", b"two")) == {}
    assert next_cache.names() == set(held.values())


# Digests


async def test_a_node_without_a_cache_holds_nothing_and_knows_the_digest(tmp_path: Path) -> None:
    files = NodeWeightFiles(tmp_path / "weights.json", None)
    model = a_model(tmp_path / "one", b"one")
    assert await files.pin("i-1", model) == {}
    assert len(await files.digest(model)) == 64


async def test_the_digest_of_weights_follows_their_bytes(tmp_path: Path) -> None:
    remembered = tmp_path / "weights.json"
    files = NodeWeightFiles(remembered, None)
    model = a_model(tmp_path / "one", b"one", b"two")
    before = await files.digest(model)
    assert before == await files.digest(model)

    remembered.write_text("")
    assert before == await files.digest(model)
    assert json.loads(remembered.read_text())

    model.weights[1].write_bytes(b"two and more")
    assert await files.digest(model) != before


# Any order


@given(
    st.lists(st.tuples(st.sampled_from("hr"), st.integers(0, 3), st.integers(0, 4)), max_size=20),
    st.integers(1, 3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_whatever_comes_the_budget_holds_and_nothing_held_leaves(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int, int]], room: int
) -> None:
    folder = tmp_path_factory.mktemp("any-order")

    async def play() -> None:
        cache = GatedCache(folder / "weights", room * FILE)
        files = NodeWeightFiles(folder / "weights.json", cache)
        holding: dict[str, set[str]] = {}
        for action, instance, number in actions:
            name = f"i-{instance}"
            if action == "h" and name not in holding:
                model = a_model(folder / f"m-{number}", *(b"%d" % part for part in range(number, number + 2)))
                holding[name] = set((await files.pin(name, model)).values())
            elif action == "r":
                files.unpin(name)
                holding.pop(name, None)
            whole = {name for name in cache.names() if not name.startswith(".")}
            assert len(whole) * FILE <= cache.budget
            assert set().union(*holding.values()) <= whole

    asyncio.run(play())


def test_files_take_whole_huge_pages() -> None:
    assert [occupied(size) for size in (1, FILE, FILE + 1)] == [FILE, FILE, 2 * FILE]


async def turns() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_file_written_to_in_place_is_told_from_one_that_was_replaced(
    files: NodeWeightFiles, tmp_path: Path
) -> None:
    # Given two files that are mapped
    paths = tuple(tmp_path / name for name in ("one.safetensors", "two.safetensors"))
    for path in paths:
        path.write_bytes(b"weights")
    mapped = await files.mapped(Model("m", "causal_lm", tmp_path, paths, 14, 0))
    assert await files.overwritten(mapped) == ""

    # When one gets another file in its place, what is mapped stays
    (tmp_path / "new").write_bytes(b"others!")
    (tmp_path / "new").replace(paths[0])
    assert await files.overwritten(mapped) == ""
    paths[0].unlink()
    assert await files.overwritten(mapped) == ""

    # When the other one is written to, it does not
    with paths[1].open("r+b") as file:
        file.write(b"W")
    os.utime(paths[1], ns=(0, mapped[1].modified_ns + 1))
    assert await files.overwritten(mapped) == str(paths[1])


async def test_weights_that_were_written_to_and_made_to_look_old_are_read_again(
    files: NodeWeightFiles, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    model = Model("m", "causal_lm", tmp_path, (path,), 7, 0)
    before, status = await files.digest(model), path.stat()

    path.write_bytes(b"WEIGHTS")
    # Again, until the kernel's clock has ticked.
    while path.stat().st_ctime_ns == status.st_ctime_ns:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert await files.digest(model) != before

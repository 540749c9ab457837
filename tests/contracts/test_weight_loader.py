"""The loader's process and who drives it, over a driver in memory: files that come and leave, and its end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from snapshotd.adapters.clock import SystemClock
from snapshotd.adapters.cuda import weight_loader
from snapshotd.adapters.cuda.weight_loader import PAUSE, SOCKET, LoaderProcess
from snapshotd.weights.cache import WeightCache
from snapshotd.weights.files import NodeWeightFiles
from snapshotd.weights.mount import HUGE_PAGE
from tests.fakes.fake_driver import UUIDS
from tests.unit.snapshotd.weights.test_weight_files import a_model

LOADER = (
    "import os; from snapshotd.cuda.loader import run; from tests.fakes.fake_driver import FakeDriver\n"
    "os.write(1, b'a banner\\n')\n"
    "driver = FakeDriver(); driver.refusals |= {refusals}\n"
    "run(driver)"
)
# One that is ready, answers registering, and nothing else.
DEAF = (
    "import json, sys; print(json.dumps({'ready': True}), flush=True)\n"
    "for line in sys.stdin:\n"
    " message = json.loads(line)\n"
    " 'register' in message and print(json.dumps({'id': message['id'], 'ok': True}), flush=True)"
)
UNIT = 2 << 20


class StillClock(SystemClock):
    """Its seconds pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


class Bench:
    """A cache with room for one file, and its loader."""

    def __init__(self, directory: Path) -> None:
        self.models = directory
        (directory / "weights").mkdir()
        self.cache = WeightCache(directory / "weights", HUGE_PAGE, threads=1)
        self.files = NodeWeightFiles(directory / "weights.json", self.cache)
        self.clock = StillClock()
        self.starts = directory / "starts"

    def open(self, program: str, leave_timeout: float = 10.0) -> LoaderProcess:
        counted = f"open({str(self.starts)!r}, 'a').write('.')\n{program}"
        command = [sys.executable, "-c", counted]
        loader = LoaderProcess(
            self.cache.directory, self.clock, self.cache.digests, command, leave_timeout=leave_timeout
        )
        self.cache.on_eviction, self.cache.on_fill = loader.files_left, loader.file_came
        self.loader = loader
        return loader

    async def hold(self, name: str) -> str:
        """The digest of a model's one file, which is in the cache then, and held by nobody."""
        held = await self.files.pin(name, a_model(self.models / name, name.encode()))
        self.files.unpin(name)
        return held["model-0.safetensors"]

    async def registered(self) -> None:
        await asyncio.gather(*self.loader._registering)

    def mapped(self) -> set[str]:
        """The weight files that the loader maps, those that were removed as well."""
        assert self.loader._process is not None
        maps = Path(f"/proc/{self.loader._process.process.pid}/maps").read_text()
        prefix = f"{self.cache.directory}/"
        return {line.split(prefix)[1] for line in maps.splitlines() if prefix in line}

    async def order(self, digest: str) -> bytes:
        order = {"gpu": UUIDS[0], "size": UNIT, "pieces": [(digest, 0, 2, 0)]}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(self.cache.directory / SOCKET))
            connection.sendall(json.dumps(order).encode() + b"\n")
            said, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 4096, 1)
        for descriptor in descriptors:
            said = os.pread(descriptor, 2, 0)
            os.close(descriptor)
        return said


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.loader.close()


def working(**refusals: str) -> str:
    return LOADER.format(refusals=refusals)


async def test_a_file_is_registered_when_it_comes(bench: Bench) -> None:
    await bench.open(working()).prepare()
    assert await bench.loader.ready()

    digest = await bench.hold("one")
    await bench.registered()

    assert bench.mapped() == {digest}
    assert await bench.order(digest) == b"on"


async def test_files_that_were_there_first_are_registered_when_it_starts(bench: Bench) -> None:
    bench.open(working())
    digest = await bench.hold("one")

    await bench.loader.prepare()
    await bench.registered()

    assert bench.mapped() == {digest}


async def test_the_next_file_is_copied_when_the_loader_has_let_go_of_the_last(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.open(working()).prepare()
    first = await bench.hold("one")
    await bench.registered()
    assert bench.mapped() == {first}
    seen: list[set[str]] = []
    watch(bench, monkeypatch, lambda: seen.append(bench.mapped()))

    second = await bench.hold("two")
    await bench.registered()

    assert seen == [set()]
    assert bench.mapped() == {second}


async def test_a_loader_that_does_not_let_go_is_ended_before_the_next_file_is_copied(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.open(DEAF, leave_timeout=0.1).prepare()
    await bench.hold("one")
    assert bench.loader._process is not None
    process = bench.loader._process.process
    ended: list[int | None] = []
    watch(bench, monkeypatch, lambda: ended.append(process.returncode))

    await bench.hold("two")

    assert ended == [-9]


async def test_a_loader_whose_driver_keeps_the_memory_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.open(working(cuMemHostUnregister="CUDA_ERROR_UNKNOWN")).prepare()
    await bench.hold("one")
    await bench.registered()
    assert bench.loader._process is not None
    process = bench.loader._process.process
    ended: list[int | None] = []
    watch(bench, monkeypatch, lambda: ended.append(process.returncode))

    await bench.hold("two")

    assert ended == [1]


@pytest.mark.node
async def test_a_full_tmpfs_has_room_again_at_once(bench: Bench) -> None:
    # given: a tmpfs that holds one file and no other beside it, which the loader maps
    bench.cache.open()
    try:
        await bench.open(working()).prepare()
        contents = (b"1" * HUGE_PAGE, b"2" * HUGE_PAGE)
        for number, content in enumerate(contents):
            held = await bench.files.pin(str(number), a_model(bench.models / f"m{number}", content))
            bench.files.unpin(str(number))
            await bench.registered()
            assert bench.mapped() == set(held.values())
        with (
            (bench.cache.directory / "more").open("wb") as file,
            pytest.raises(OSError, match=os.strerror(errno.ENOSPC)),
        ):
            os.posix_fallocate(file.fileno(), 0, HUGE_PAGE)
    finally:
        await bench.loader.close()
        bench.cache.close()


async def test_after_an_error_that_lasts_another_loader_is_started(bench: Bench) -> None:
    await bench.open(working(cuMemCreate="CUDA_ERROR_ILLEGAL_ADDRESS")).prepare()
    digest = await bench.hold("one")
    assert b"CUDA_ERROR_ILLEGAL_ADDRESS" in await bench.order(digest)
    await ended(bench)

    # Not at once: the next one may end the same way.
    assert not await bench.loader.ready()
    assert bench.starts.read_text() == "."
    bench.clock.seconds += PAUSE
    assert not await bench.loader.ready()
    await bench.loader.prepare()
    assert await bench.loader.ready()
    assert bench.starts.read_text() == ".."


async def test_a_loader_that_cannot_start_is_tried_again_after_a_pause(bench: Bench) -> None:
    loader = bench.open(working(cuInit="CUDA_ERROR_NO_DEVICE"))
    await loader.prepare()
    for _ in range(3):
        assert not await loader.ready()
    assert bench.starts.read_text() == "."

    bench.clock.seconds += PAUSE
    assert not await loader.ready()
    assert loader._starting is not None
    await loader._starting
    assert not await loader.ready()
    assert bench.starts.read_text() == ".."


async def test_nobody_waits_for_a_loader_that_starts(bench: Bench) -> None:
    bench.open("import signal; signal.pause()").begin()

    assert not await bench.loader.ready()
    await bench.loader.files_left()
    digest = await bench.hold("one")
    assert bench.cache.digests() == [digest]


async def test_a_loader_ends_with_its_daemon(bench: Bench) -> None:
    await bench.open(working()).prepare()
    assert bench.loader._process is not None
    process = bench.loader._process.process
    assert process.stdin is not None
    process.stdin.close()
    assert await process.wait() == 0


def test_without_the_bindings_there_is_no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.util.find_spec", find)
    assert not weight_loader.available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert weight_loader.available()


def watch(bench: Bench, monkeypatch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
    """Look just before a file is copied."""
    copy = bench.cache._copy

    async def looked(source: Path, partial: Path) -> str:
        look()
        return await copy(source, partial)

    monkeypatch.setattr(bench.cache, "_copy", looked)


async def ended(bench: Bench) -> None:
    assert bench.loader._process is not None
    await asyncio.wait([bench.loader._process._reading])

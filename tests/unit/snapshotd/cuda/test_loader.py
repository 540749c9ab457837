"""The loader of weights: what it copies, what it keeps, and when it gives up."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapshotd.cuda import gpus as gpus_module
from snapshotd.cuda.driver import DriverError, LoaderError
from snapshotd.cuda.gpus import Gpus, strides
from snapshotd.cuda.loader import Loader, locate
from snapshotd.cuda.registered import Files
from tests.fakes.fake_driver import UUIDS, FakeDriver

UNIT = 2 << 20
CONTENT = bytes(range(256)) * 64
OLD, NEW = "a" * 64, "b" * 64


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


class Bench:
    """A loader, what it is asked, and what it gave up for."""

    def __init__(self, directory: Path, driver: FakeDriver) -> None:
        self.directory = directory
        self.driver = driver
        self.given_up: list[str] = []
        self.loader = Loader(Gpus(driver), Files(directory, driver), self.given_up.append)
        self.add(OLD)

    def add(self, name: str) -> None:
        (self.directory / name).write_bytes(CONTENT)

    def remove(self, name: str) -> None:
        (self.directory / name).rename(self.directory / f".evicted-{name}")

    def order(self, *pieces: tuple[str, int, int, int], gpu: str = UUIDS[0], size: int = UNIT) -> bytes:
        """What comes back: the memory that was loaded, or what was said."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(json.dumps({"gpu": gpu, "size": size, "pieces": pieces}).encode() + b"\n")
            self.loader.serve(theirs)
            said, descriptors, _, _ = socket.recv_fds(ours, 4096, 1)
        if not descriptors:
            return said
        with os.fdopen(descriptors[0], "rb") as memory:
            memory.seek(0)
            return memory.read()

    def mapped(self) -> int:
        """How many of its files this process maps."""
        return Path("/proc/self/maps").read_text().count(f"{self.directory}/")


@pytest.fixture
def bench(tmp_path: Path, driver: FakeDriver) -> Iterator[Bench]:
    bench = Bench(tmp_path, driver)
    yield bench
    # Nothing of an order stays, however it ended.
    assert driver.memory == {}
    assert driver._mapped == {}


# What an order brings


def test_an_order_is_answered_with_the_bytes_it_named_where_it_wanted_them(bench: Bench) -> None:
    block = bench.order((f"/weights/{OLD}", 8, 100, 0), (f"/weights/{OLD}", 1000, 50, 256))

    assert len(block) == UNIT
    assert block[:100] == CONTENT[8:108]
    assert block[256:306] == CONTENT[1000:1050]


def test_a_long_copy_is_made_in_strides(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus_module, "STRIDE", 1000)

    assert bench.order((OLD, 0, len(CONTENT), 512))[512 : 512 + len(CONTENT)] == CONTENT
    assert list(strides([(0, 2500, 7)])) == [(0, 1000, 7), (1000, 1000, 1007), (2000, 500, 2007)]


def test_a_file_is_registered_once_and_a_gpu_opened_when_it_is_used(bench: Bench) -> None:
    assert bench.driver.contexts == set()

    bench.order((OLD, 0, 10, 0))
    bench.order((OLD, 0, 10, 0))

    assert bench.driver.calls.count("cuMemHostRegister") == 1
    assert bench.driver.contexts == {0}


def test_a_file_that_is_registered_ahead_opens_every_gpu(bench: Bench) -> None:
    assert bench.loader.answer({"id": 7, "register": OLD}) == {"id": 7, "ok": True}

    assert bench.driver.contexts == {0, 1}
    before = bench.driver.calls.count("cuMemHostRegister")
    assert bench.order((OLD, 0, 10, 0), gpu=UUIDS[1])[:10] == CONTENT[:10]
    assert bench.driver.calls.count("cuMemHostRegister") == before == 1


def test_a_gpu_that_is_full_keeps_no_file_from_being_registered(bench: Bench) -> None:
    bench.driver.refusals["cuDevicePrimaryCtxRetain"] = "CUDA_ERROR_OUT_OF_MEMORY"

    assert bench.loader.answer({"id": 1, "register": OLD}) == {"id": 1, "ok": True}
    assert bench.driver.contexts == {1}


def test_a_gpu_that_lets_one_process_in_is_left_to_its_users(bench: Bench) -> None:
    bench.driver.modes[0] = "CU_COMPUTEMODE_EXCLUSIVE_PROCESS"

    assert bench.loader.answer({"id": 1, "register": OLD}) == {"id": 1, "ok": True}
    assert bench.driver.contexts == {1}
    assert f"nvidia-smi -i {UUIDS[0]} -c DEFAULT".encode() in bench.order((OLD, 0, 10, 0))
    assert bench.driver.contexts == {1}
    assert bench.given_up == []


def test_where_no_gpu_is_to_be_shared_no_file_is_registered(bench: Bench) -> None:
    bench.driver.modes = ["CU_COMPUTEMODE_EXCLUSIVE_PROCESS"] * 2

    answer = bench.loader.answer({"id": 1, "register": OLD})

    assert "one process in at a time" in answer["error"]
    assert "cuMemHostRegister" not in bench.driver.calls
    assert (bench.driver.contexts, bench.given_up) == (set(), [])


# What it refuses


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        ((OLD, len(CONTENT), 1, 0), "do not fit"),
        ((OLD, -1, 2, 0), "do not fit"),
        ((OLD, 0, -1, 0), "do not fit"),
        ((OLD, 0, 2, UNIT - 1), "do not fit"),
        ((OLD, 0, 2, -1), "do not fit"),
        (("/etc/passwd", 0, 1, 0), "not among"),
        (("link", 0, 1, 0), "not among"),
        (("..", 0, 1, 0), "not among"),
    ],
)
def test_what_is_not_in_a_weight_file_or_not_in_the_block_is_not_copied(
    bench: Bench, piece: tuple[str, int, int, int], said: str
) -> None:
    (bench.directory / "link").symlink_to("/etc/passwd")

    assert said in bench.order(piece).decode()
    assert "cuMemCreate" not in bench.driver.calls
    assert bench.given_up == []


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"[]\n", b"not json\n", b'{"gpu": "GPU-1"}\n'])
def test_what_is_no_order_is_told(bench: Bench, line: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(line)
        bench.loader.serve(theirs)
        assert ours.recv(4096)
    assert bench.given_up == []


def test_pieces_are_located_in_the_registered_memory(bench: Bench) -> None:
    Gpus(bench.driver).get(UUIDS[0])
    with Files(bench.directory, bench.driver).use([OLD]) as files:
        start = files[OLD].address
        assert locate(files, [(OLD, 8, 100, 256)], UNIT) == [(start + 8, 100, 256)]
        with pytest.raises(LoaderError, match="do not fit"):
            locate(files, [(OLD, 8, len(CONTENT), 0)], UNIT)


# Who wants it no more


def test_an_order_that_was_cancelled_before_it_began_takes_no_memory(bench: Bench) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(json.dumps({"gpu": UUIDS[0], "size": UNIT, "pieces": [(OLD, 0, 9, 0)]}).encode() + b"\n")
    bench.loader.serve(theirs)

    assert "cuMemCreate" not in bench.driver.calls


def test_an_order_that_is_cancelled_between_its_copies_gives_its_memory_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus_module, "STRIDE", 1000)
    ours, theirs = socket.socketpair()
    bench.driver.before["cuMemcpyHtoDAsync"] = ours.close
    ours.sendall(json.dumps({"gpu": UUIDS[0], "size": UNIT, "pieces": [(OLD, 0, 9000, 0)]}).encode() + b"\n")
    bench.loader.serve(theirs)

    assert bench.driver.calls.count("cuMemcpyHtoDAsync") == 1
    assert "cuMemExportToShareableHandle" not in bench.driver.calls
    assert bench.driver.memory == {}


# What it lets go


def test_a_file_that_left_is_unregistered_and_unmapped(bench: Bench) -> None:
    bench.order((OLD, 0, 10, 0))
    assert bench.mapped() == 1
    bench.remove(OLD)

    # As snapshotd's message is answered: by a thread that has used no GPU yet.
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(bench.loader.answer, {"id": 1, "left": True}).result()

    assert answer == {"id": 1, "ok": True}
    assert bench.driver.registered == {}
    assert bench.mapped() == 0
    assert "not among" in bench.order((OLD, 0, 10, 0)).decode()


def test_a_file_that_stays_is_kept(bench: Bench) -> None:
    bench.add(NEW)
    bench.order((OLD, 0, 10, 0), (NEW, 0, 10, 10))
    bench.remove(OLD)

    bench.loader.answer({"id": 1, "left": True})

    assert len(bench.driver.registered) == 1
    assert bench.order((NEW, 0, 10, 0))[:10] == CONTENT[:10]
    assert bench.driver.calls.count("cuMemHostRegister") == 2


def test_another_file_under_the_same_name_is_registered_anew(bench: Bench) -> None:
    bench.order((OLD, 0, 10, 0))
    bench.remove(OLD)
    (bench.directory / OLD).write_bytes(CONTENT[::-1])

    assert bench.order((OLD, 0, 10, 0))[:10] == CONTENT[::-1][:10]
    assert len(bench.driver.registered) == 1


def test_a_file_is_let_go_only_when_the_order_that_reads_it_is_done(bench: Bench) -> None:
    copying, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        copying.set()
        assert go_on.wait(30)

    bench.driver.before["cuStreamSynchronize"] = pause
    with ThreadPoolExecutor(2) as pool:
        order = pool.submit(bench.order, (OLD, 0, len(CONTENT), 0))
        assert copying.wait(30)
        bench.remove(OLD)
        # Another order notices as well that the file left, and closes nothing.
        bench.driver.before.clear()
        assert "not among" in bench.order((OLD, 0, 10, 0)).decode()
        left = pool.submit(bench.loader.answer, {"id": 1, "left": True})
        assert (len(bench.driver.registered), bench.mapped()) == (1, 1)
        assert not left.done()

        go_on.set()

        assert left.result(30) == {"id": 1, "ok": True}
        assert order.result(30)[: len(CONTENT)] == CONTENT
    assert (bench.driver.registered, bench.mapped()) == ({}, 0)


def test_a_file_that_leaves_while_it_is_registered_is_let_go_as_well(bench: Bench) -> None:
    registering, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        registering.set()
        assert go_on.wait(30)

    bench.driver.before["cuMemHostRegister"] = pause
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(bench.loader.answer, {"id": 1, "register": OLD})
        assert registering.wait(30)
        bench.remove(OLD)
        left = pool.submit(bench.loader.answer, {"id": 2, "left": True})
        go_on.set()
        assert ahead.result(30)
        assert left.result(30) == {"id": 2, "ok": True}
    assert (bench.driver.registered, bench.mapped()) == ({}, 0)


# When it gives up


@pytest.mark.parametrize("function", ["cuMemCreate", "cuMemMap", "cuMemcpyHtoDAsync", "cuMemHostRegister"])
@pytest.mark.parametrize("status", ["CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_INVALID_VALUE"])
def test_after_a_refusal_that_passes_the_next_order_works(bench: Bench, function: str, status: str) -> None:
    bench.driver.refusals[function] = status

    assert bench.order((OLD, 0, 10, 0)) == f"{function} failed: {status}".encode()
    assert bench.given_up == []
    assert bench.order((OLD, 0, 10, 0))[:10] == CONTENT[:10]


@pytest.mark.parametrize(
    "function", ["cuMemCreate", "cuStreamSynchronize", "cuMemHostRegister", "cuMemUnmap"]
)
def test_an_error_that_lasts_is_told_and_ends_the_process(bench: Bench, function: str) -> None:
    bench.driver.refusals[function] = "CUDA_ERROR_ILLEGAL_ADDRESS"

    said = bench.order((OLD, 0, 10, 0))

    assert said == f"{function} failed: CUDA_ERROR_ILLEGAL_ADDRESS".encode()
    assert bench.given_up == [said.decode()]
    bench.driver._mapped.clear()
    bench.driver.memory.clear()


def test_memory_that_the_driver_does_not_let_go_ends_the_process(bench: Bench) -> None:
    bench.order((OLD, 0, 10, 0))
    bench.remove(OLD)
    bench.driver.refusals["cuMemHostUnregister"] = "CUDA_ERROR_INVALID_VALUE"

    answer = bench.loader.answer({"id": 1, "left": True})

    assert "cuMemHostUnregister" in answer["error"]
    assert bench.given_up == [answer["error"]]


def test_without_a_driver_there_are_no_gpus(driver: FakeDriver) -> None:
    driver.refusals["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    with pytest.raises(DriverError, match="CUDA_ERROR_NO_DEVICE"):
        Gpus(driver)

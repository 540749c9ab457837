"""The page server against what CRIU sends: the files are those that CRIU itself would have written."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from snapshotd.images import PAGE_SERVER_READY, page_server
from snapshotd.images.format import PAGE, PAGE_IN_PARENT, PAGE_PRESENT, ImageFormat, PageRun
from snapshotd.preflight import find_criu

BASE = 0x7F0000000000
# Of CRIU 4.0 and 4.1, and from 4.2 on.
LAYOUTS = {"4.0": "<IIQQ", "4.2": "<I4xQQQ"}
FIRST, SECOND, SHARED = 1 << 8 | 1, 20 << 8 | 1, 5 << 8 | 2


class Dump:
    """CRIU's end, and the page server at the other."""

    def __init__(self, layout: str, images: ImageFormat, directory: Path, pool: ThreadPoolExecutor) -> None:
        self.layout = layout
        self.connection, theirs = socket.socketpair()
        self.served: Future[None] = pool.submit(self._serve, theirs, images, directory)
        assert self.connection.recv(1) == PAGE_SERVER_READY

    def _serve(self, connection: socket.socket, images: ImageFormat, directory: Path) -> None:
        with connection:
            page_server.serve(connection, lambda: images, directory, 2 * PAGE)

    def say(self, command: int, flags: int = 0, pages: int = 0, address: int = 0, whose: int = 0) -> None:
        self.connection.sendall(struct.pack(self.layout, flags << 16 | command, pages, address, whose))

    def open(self, whose: int) -> None:
        self.say(page_server.OPEN, whose=whose)
        assert self.connection.recv(1) == page_server.NO_PARENT

    def add(self, run: PageRun, data: bytes, whose: int) -> None:
        self.say(page_server.ADD, run.flags, run.pages, run.start, whose)
        self.connection.sendall(data)

    def close(self) -> bytes:
        self.say(page_server.FORCE_CLOSE)
        return self.connection.recv(4)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(scope="module")
def images() -> ImageFormat:
    criu, _ = find_criu()
    return ImageFormat(criu.pycriu if criu else None)


@pytest.fixture(params=sorted(LAYOUTS))
def dump(
    request: pytest.FixtureRequest, images: ImageFormat, tmp_path: Path, pool: ThreadPoolExecutor
) -> Iterator[Dump]:
    dump = Dump(LAYOUTS[request.param], images, tmp_path, pool)
    with dump.connection:
        yield dump


def content(pages: int, seed: int) -> bytes:
    return b"".join(struct.pack("<Q", seed + page) * (PAGE // 8) for page in range(pages))


def test_each_memory_gets_its_pages_and_its_map(dump: Dump, images: ImageFormat, tmp_path: Path) -> None:
    # given: shared memory, which CRIU sends first, and two processes; one is larger than expected, one has a
    # page that is not sent
    small, large = PageRun(BASE, 3, PAGE_PRESENT), PageRun(BASE + 9 * PAGE, 9000, PAGE_PRESENT)
    absent, present = PageRun(BASE, 1, PAGE_IN_PARENT), PageRun(BASE + PAGE, 2, PAGE_PRESENT)
    sent = {
        SHARED: [(PageRun(0, 1, PAGE_PRESENT), content(1, 3))],
        FIRST: [(small, content(3, 1)), (large, content(9000, 50))],
        SECOND: [(absent, b""), (present, content(2, 7))],
    }

    # when
    for whose, runs in sent.items():
        dump.open(whose)
        for run, data in runs:
            dump.add(run, data, whose)
    answer = dump.close()
    dump.served.result()

    # then
    assert answer == struct.pack("<i", 0)
    # the first process is in the file that has room for it already
    assert images.read_pagemap(tmp_path / "pagemap-1.img")[0] == 1
    for name, whose in (("1", FIRST), ("20", SECOND), ("shmem-5", SHARED)):
        number, found = images.read_pagemap(tmp_path / f"pagemap-{name}.img")
        assert found == [run for run, _ in sent[whose]]
        assert (tmp_path / f"pages-{number}.img").read_bytes() == b"".join(data for _, data in sent[whose])


def test_criu_4_2_gets_the_field_that_it_requires(
    images: ImageFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: entries as its pagemap.proto has them
    file = descriptor_pb2.FileDescriptorProto(name="pagemap-4.2.proto", syntax="proto2")
    entry = file.message_type.add(name="pagemap_entry")
    field = descriptor_pb2.FieldDescriptorProto
    for number, name, label in (
        (1, "vaddr", field.LABEL_REQUIRED),
        (2, "compat_nr_pages", field.LABEL_REQUIRED),
        (4, "flags", field.LABEL_OPTIONAL),
        (5, "nr_pages", field.LABEL_OPTIONAL),
    ):
        entry.field.add(name=name, number=number, label=label, type=field.TYPE_UINT64)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    of_4_2 = message_factory.GetMessageClass(pool.FindMessageTypeByName("pagemap_entry"))
    monkeypatch.setattr(images._pagemap, "pagemap_entry", of_4_2)

    # when
    images.write_pagemap(tmp_path / "pagemap-1.img", 1, [PageRun(BASE, 3, PAGE_PRESENT)])

    # then
    assert images.read_pagemap(tmp_path / "pagemap-1.img") == (1, [PageRun(BASE, 3, PAGE_PRESENT)])


def test_a_dump_that_breaks_off_is_not_taken_for_a_whole_one(dump: Dump, tmp_path: Path) -> None:
    dump.open(FIRST)
    dump.add(PageRun(BASE, 2, PAGE_PRESENT), content(1, 1), FIRST)
    dump.connection.close()

    with pytest.raises(page_server.Broken, match="ended early"):
        dump.served.result()
    assert not list(tmp_path.glob("pagemap-*"))


def test_what_it_does_not_understand_ends_it(dump: Dump) -> None:
    dump.open(FIRST)
    dump.say(99)

    with pytest.raises(page_server.Broken, match="unknown command 99"):
        dump.served.result()


def test_a_dump_that_criu_refuses_before_it_sends_anything_is_answered(dump: Dump, tmp_path: Path) -> None:
    assert dump.close() == struct.pack("<i", 0)

    dump.served.result()
    assert not list(tmp_path.glob("pagemap-*"))


def test_who_waits_for_it_learns_that_there_is_no_room(images: ImageFormat, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(FileNotFoundError):
            page_server.serve(theirs, lambda: images, tmp_path / "gone", PAGE)
        assert b"there is no space for 4096 bytes of memory: [Errno 2]" in ours.recv(200)


def test_a_dump_that_never_comes_is_no_failure(dump: Dump) -> None:
    dump.connection.close()

    assert dump.served.result() is None

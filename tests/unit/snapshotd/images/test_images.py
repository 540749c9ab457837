"""Rewriting an image changes how much a restore must read and never the memory it restores to."""

from __future__ import annotations

import itertools
import mmap
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dumont.errors import DataLoss
from snapshotd.images import layout
from snapshotd.images.compact import check, compact
from snapshotd.images.format import (
    PAGE,
    PAGE_IN_PARENT,
    PAGE_PRESENT,
    VMA_ANON_PRIVATE,
    VMA_FILE_PRIVATE,
    VMA_REGULAR,
    ImageFormat,
    Kind,
    PageRun,
)
from snapshotd.images.layout import LARGEST_GAP, SMALLEST_MAPPING
from snapshotd.preflight import find_pycriu
from snapshotd.system.mounts import MEMORY_MOUNT
from snapshotd.system.paths import cache_directory
from tests.conftest import require

BASE = 0x7F0000000000
ORIGIN_FILE = 77
FLAGS = {
    "anonymous": (VMA_REGULAR | VMA_ANON_PRIVATE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "stack": (VMA_REGULAR | VMA_ANON_PRIVATE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100),
    "file": (VMA_REGULAR | VMA_FILE_PRIVATE, mmap.MAP_PRIVATE),
    "mapped": (VMA_REGULAR | VMA_FILE_PRIVATE, mmap.MAP_PRIVATE),
}

# A process: mappings side by side, each of stretches of pages of one content.
STRETCH = st.tuples(st.sampled_from(["data", "zero", "absent"]), st.integers(1, 40))
PROCESS = st.lists(
    st.tuples(st.sampled_from(sorted(FLAGS)), st.lists(STRETCH, min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
)
Stretches = list[tuple[str, int]]


@dataclass
class Dump:
    """A dump as CRIU writes it, and the memory that it stands for."""

    directory: Path
    origin: Path
    # By address; what is missing is zero or, in a file that is not ours, the file's own.
    memory: dict[int, bytes]


@pytest.fixture(scope="module")
def images() -> ImageFormat:
    """CRIU's file format, for which its Python package is enough: no root, and no CRIU that works."""
    binary = shutil.which("criu") or cache_directory() / "criu" / "bin" / "criu"
    package = find_pycriu(Path(binary))
    require(package is not None, "pycriu is not installed; run scripts/setup")
    return ImageFormat(package if package != Path() else None)


def dump(images: ImageFormat, folder: Path, process: list[tuple[str, Stretches]]) -> Dump:
    made = Dump(folder / "image", folder / "origin", {})
    made.directory.mkdir(parents=True)
    made.origin.mkdir()
    rng = np.random.default_rng(len(process))
    runs: list[PageRun] = []
    pages: list[bytes] = []
    origin: list[bytes] = []
    vmas: list[tuple[str, int, int, int]] = []
    address = BASE
    for kind, stretches in process:
        start, offset = address, len(origin) * PAGE
        for content, count in stretches:
            for _ in range(count):
                if kind == "mapped":
                    origin.append(rng.bytes(PAGE))
                    made.memory[address] = origin[-1]
                if content != "absent":
                    page = bytes(PAGE) if content == "zero" else rng.bytes(PAGE)
                    pages.append(page)
                    made.memory[address] = page
                    if runs and runs[-1].start + runs[-1].pages * PAGE == address:
                        runs[-1] = PageRun(runs[-1].start, runs[-1].pages + 1, PAGE_PRESENT)
                    else:
                        runs.append(PageRun(address, 1, PAGE_PRESENT))
                address += PAGE
        vmas.append((kind, start, address, offset))
    images.write_pagemap(made.directory / "pagemap-1.img", 1, runs)
    (made.directory / "pages-1.img").write_bytes(b"".join(pages))
    (made.origin / "memory-1.img").write_bytes(b"".join(origin))
    _write_mm(images, made.directory / "mm-1.img", vmas)
    _write_files(images, made.directory)
    for name in ("inventory.img", "pstree.img"):
        (made.directory / name).write_bytes(b"")
    return made


def _write_mm(images: ImageFormat, path: Path, vmas: list[tuple[str, int, int, int]]) -> None:
    entry = _required(images._mm.mm_entry())
    for kind, start, end, offset in vmas:
        status, flags = FLAGS[kind]
        file = {"mapped": ORIGIN_FILE, "file": 5}.get(kind, 0)
        entry.vmas.add(
            start=start, end=end, pgoff=offset, shmid=file, prot=3, flags=flags, status=status, fd=-1
        )
    images._write(path, "MM", [entry.SerializeToString()])


def _write_files(images: ImageFormat, directory: Path) -> None:
    files = []
    for number, name in ((ORIGIN_FILE, f"{MEMORY_MOUNT}/memory-1.img"), (5, "/usr/lib/libc.so.6")):
        entry = images._files.file_entry(type=images._files.REG, id=number)
        _required(entry.reg).name = name
        _required(entry.reg.fown)
        files.append(entry.SerializeToString())
    images._write(directory / "files.img", "FILES", files)
    mount = _required(images._mounts.mnt_entry())
    mount.mountpoint, mount.mnt_id = f".{MEMORY_MOUNT}", 12
    images._write(directory / "mountpoints-3.img", "MNTS", [mount.SerializeToString()])


def _required(message: Any) -> Any:
    for field in message.DESCRIPTOR.fields:
        if field.is_required and field.message_type is None:
            setattr(message, field.name, "" if field.type == field.TYPE_STRING else 0)
    return message


def restored(images: ImageFormat, directory: Path) -> dict[int, bytes]:
    """What a restore puts into memory: the mappings first, then what it reads over them."""
    memory: dict[int, bytes] = {}
    known = images.memory_files(directory, MEMORY_MOUNT)
    for vma in images.read_vmas(directory / "mm-1.img", known):
        if vma.kind is Kind.MAPPED:
            data = (directory / known[vma.entry.shmid]).read_bytes()
            for address in range(vma.start, vma.end, PAGE):
                place = vma.offset + address - vma.start
                assert place + PAGE <= len(data), "mapped beyond the end of its file"
                memory[address] = data[place : place + PAGE]
    _, runs = images.read_pagemap(directory / "pagemap-1.img")
    pages = (directory / "pages-1.img").read_bytes()
    position = 0
    for run in runs:
        for index in range(run.pages):
            memory[run.start + index * PAGE] = pages[position : position + PAGE]
            position += PAGE
    assert position == len(pages)
    return memory


def significant(memory: dict[int, bytes], process: list[tuple[str, Stretches]]) -> dict[int, bytes]:
    """Without the zero pages, where absence means zero: everywhere but over a file that is not ours."""
    files: set[int] = set()
    address = BASE
    for kind, stretches in process:
        count = sum(length for _, length in stretches)
        if kind == "file":
            files |= set(range(address, address + count * PAGE, PAGE))
        address += count * PAGE
    return {at: page for at, page in memory.items() if at in files or page.strip(b"\0")}


def borders(images: ImageFormat, directory: Path) -> list[tuple[int, int]]:
    vmas = images.read_vmas(directory / "mm-1.img", images.memory_files(directory, MEMORY_MOUNT))
    return [(vma.start, vma.end) for vma in vmas]


@settings(max_examples=120, deadline=None)
@given(process=PROCESS)
def test_whatever_the_memory_it_restores_to_the_same(
    images: ImageFormat, tmp_path_factory: pytest.TempPathFactory, process: list[tuple[str, Stretches]]
) -> None:
    made = dump(images, tmp_path_factory.mktemp("dump"), process)
    first, last = borders(images, made.directory)[0][0], borders(images, made.directory)[-1][1]

    compact(images, made.directory, made.origin, threads=2)

    check(images, made.directory)
    assert significant(restored(images, made.directory), process) == significant(made.memory, process)
    parts = borders(images, made.directory)
    assert (parts[0][0], parts[-1][1]) == (first, last)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(parts))


def test_what_is_large_is_mapped_and_only_crumbs_are_read(images: ImageFormat, tmp_path: Path) -> None:
    crumb = SMALLEST_MAPPING - 1
    made = dump(images, tmp_path, [("anonymous", [("data", 100), ("zero", 90), ("data", crumb)])])

    compact(images, made.directory, None, threads=1)

    _, runs = images.read_pagemap(made.directory / "pagemap-1.img")
    assert [run.pages for run in runs] == [crumb]
    assert (made.directory / "pages-1.img").stat().st_size == crumb * PAGE
    # What is read from elsewhere, or is zero, takes no space in the memory file.
    assert (made.directory / "memory-1.img").stat().st_blocks * 512 == 100 * PAGE


def test_memory_full_of_holes_is_cut_into_few_mappings(
    images: ImageFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holes = [("data", SMALLEST_MAPPING), ("zero", LARGEST_GAP + 1)] * 100
    made = dump(images, tmp_path, [("anonymous", holes)])
    monkeypatch.setattr(layout, "MOST_MAPPINGS", 50)

    compact(images, made.directory, None, threads=1)

    assert len(borders(images, made.directory)) <= 50
    process = [("anonymous", holes)]
    assert significant(restored(images, made.directory), process) == significant(made.memory, process)


def test_a_stack_stays_anonymous_and_loses_its_zeros(images: ImageFormat, tmp_path: Path) -> None:
    made = dump(images, tmp_path, [("stack", [("data", 50), ("zero", 50)])])

    compact(images, made.directory, None, threads=1)

    kinds = [vma.kind for vma in images.read_vmas(made.directory / "mm-1.img", {})]
    assert kinds == [Kind.ZEROS]
    assert (made.directory / "pages-1.img").stat().st_size == 50 * PAGE


def test_zero_pages_over_a_file_are_data_and_stay(images: ImageFormat, tmp_path: Path) -> None:
    made = dump(images, tmp_path, [("file", [("zero", 50)])])

    compact(images, made.directory, None, threads=1)

    assert (made.directory / "pages-1.img").stat().st_size == 50 * PAGE


def test_what_was_mapped_from_an_earlier_snapshot_is_taken_over(images: ImageFormat, tmp_path: Path) -> None:
    made = dump(images, tmp_path, [("mapped", [("absent", 30), ("data", 1), ("absent", 30), ("zero", 1)])])

    compact(images, made.directory, made.origin, threads=1)
    (made.origin / "memory-1.img").unlink()

    names = images.memory_files(made.directory, MEMORY_MOUNT)
    assert list(names.values()) == ["memory-1.img"]
    after = restored(images, made.directory)
    assert after == made.memory


def test_runs_whose_pages_lie_in_a_parent_image_take_no_bytes(images: ImageFormat, tmp_path: Path) -> None:
    made = dump(images, tmp_path, [("anonymous", [("zero", 20)])])
    runs = [PageRun(BASE - PAGE, 1, PAGE_IN_PARENT), PageRun(BASE, 20, PAGE_PRESENT)]
    images.write_pagemap(made.directory / "pagemap-1.img", 1, runs)

    compact(images, made.directory, None, threads=1)

    assert images.read_pagemap(made.directory / "pagemap-1.img") == (1, runs[:1])


def test_a_map_of_other_pages_than_there_are_is_refused(images: ImageFormat, tmp_path: Path) -> None:
    made = dump(images, tmp_path, [("anonymous", [("data", 20)])])
    images.write_pagemap(made.directory / "pagemap-1.img", 1, [PageRun(BASE, 19, PAGE_PRESENT)])

    with pytest.raises(DataLoss) as refusal:
        compact(images, made.directory, None, threads=1)
    assert refusal.value.reason == "IMAGE_INCOMPLETE"


@pytest.mark.parametrize("damage", ["short", "missing", "no inventory", "mapped beyond its end"])
def test_an_incomplete_dump_is_refused_by_name(images: ImageFormat, tmp_path: Path, damage: str) -> None:
    made = dump(images, tmp_path, [("anonymous", [("data", 5), ("zero", 20), ("data", 30)])])
    compact(images, made.directory, None, threads=1)
    pages, memory = made.directory / "pages-1.img", made.directory / "memory-1.img"
    if damage == "short":
        pages.write_bytes(pages.read_bytes()[:-1])
    elif damage == "missing":
        pages.unlink()
    elif damage == "mapped beyond its end":
        memory.write_bytes(memory.read_bytes()[:-PAGE])
    else:
        (made.directory / "inventory.img").unlink()

    with pytest.raises(DataLoss) as refusal:
        check(images, made.directory)
    assert refusal.value.reason == "IMAGE_INCOMPLETE"


@pytest.mark.parametrize("content", [b"", b"12345678", b"not an image at all"])
def test_a_file_that_is_no_image_is_refused(images: ImageFormat, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pagemap-1.img").write_bytes(content)
    with pytest.raises(DataLoss):
        images.read_pagemap(tmp_path / "pagemap-1.img")


def test_an_image_cut_in_a_message_is_refused(images: ImageFormat, tmp_path: Path) -> None:
    path = tmp_path / "pagemap-1.img"
    images.write_pagemap(path, 1, [PageRun(BASE, 1, PAGE_PRESENT)])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataLoss, match="is cut short"):
        images.read_pagemap(path)

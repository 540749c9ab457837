"""Dropping zero pages changes an image's size and never the memory it restores to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dumont.errors import DataLoss
from snapshotd.images.compact import check, compact
from snapshotd.images.format import PAGE, PAGE_IN_PARENT, PAGE_PRESENT, VMA_ANON_PRIVATE, ImageFormat, PageRun
from snapshotd.preflight import find_criu

BASE = 0x7F0000000000
# Pages of a small address space: where anonymous memory lies, and what each page holds.
LAYOUTS = st.lists(
    st.tuples(st.booleans(), st.sampled_from(["zero", "data", "absent"])), min_size=1, max_size=60
)


@pytest.fixture(scope="module")
def images(criu: Path) -> ImageFormat:
    found, _ = find_criu()
    assert found is not None
    return ImageFormat(found.pycriu)


def write_mm(images: ImageFormat, path: Path, anonymous: list[tuple[int, int]]) -> None:
    """The memory map of a process with these ranges of private anonymous memory."""
    entry = images._mm.mm_entry()
    for field in entry.DESCRIPTOR.fields:
        if field.is_required:
            setattr(entry, field.name, 0)
    for start, end in anonymous:
        entry.vmas.add(
            start=start, end=end, pgoff=0, shmid=0, prot=3, flags=0x22, status=VMA_ANON_PRIVATE | 1, fd=-1
        )
    images._write(path, "MM", [entry.SerializeToString()])


def write_dump(images: ImageFormat, directory: Path, layout: list[tuple[bool, str]]) -> dict[int, bytes]:
    """A dump as CRIU writes it; returns the memory it stands for, by page address."""
    rng = np.random.default_rng(len(layout))
    runs: list[PageRun] = []
    content: list[bytes] = []
    memory: dict[int, bytes] = {}
    for index, (anonymous, kind) in enumerate(layout):
        address = BASE + index * PAGE
        if kind == "absent":
            continue
        page = bytes(PAGE) if kind == "zero" else rng.bytes(PAGE)
        content.append(page)
        if not (anonymous and kind == "zero"):
            memory[address] = page
        if runs and runs[-1].start + runs[-1].pages * PAGE == address:
            runs[-1] = PageRun(runs[-1].start, runs[-1].pages + 1, PAGE_PRESENT)
        else:
            runs.append(PageRun(address, 1, PAGE_PRESENT))
    images.write_pagemap(directory / "pagemap-1.img", 1, runs)
    (directory / "pages-1.img").write_bytes(b"".join(content))
    ranges = [
        (BASE + i * PAGE, BASE + (i + 1) * PAGE) for i, (anonymous, _) in enumerate(layout) if anonymous
    ]
    write_mm(images, directory / "mm-1.img", ranges)
    for name in ("inventory.img", "pstree.img"):
        (directory / name).write_bytes(b"")
    return memory


def read_memory(images: ImageFormat, directory: Path) -> dict[int, bytes]:
    """What a restore would put into memory, less the zero pages of anonymous memory."""
    _, runs = images.read_pagemap(directory / "pagemap-1.img")
    anonymous = images.read_vmas(directory / "mm-1.img", {})
    data = (directory / "pages-1.img").read_bytes()
    memory: dict[int, bytes] = {}
    position = 0
    for run in runs:
        for index in range(run.pages):
            page = data[position : position + PAGE]
            position += PAGE
            address = run.start + index * PAGE
            inside = any(start <= address < end for start, end in anonymous)
            if page.strip(b"\0") or not inside:
                memory[address] = page
    assert position == len(data)
    return memory


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS)
def test_whatever_the_memory_it_restores_to_the_same(
    images: ImageFormat, tmp_path_factory: pytest.TempPathFactory, layout: list[tuple[bool, str]]
) -> None:
    directory = tmp_path_factory.mktemp("image")
    memory = write_dump(images, directory, layout)

    compact(images, directory, threads=2)

    check(images, directory)
    assert read_memory(images, directory) == memory


def test_zero_pages_of_anonymous_memory_are_gone(images: ImageFormat, tmp_path: Path) -> None:
    layout = [(True, "data")] * 10 + [(True, "zero")] * 90
    write_dump(images, tmp_path, layout)

    done = compact(images, tmp_path, threads=1)

    assert done.before == 100 * PAGE
    assert done.after == 10 * PAGE
    assert (tmp_path / "pages-1.img").stat().st_size == 10 * PAGE


def test_zero_pages_over_a_file_are_data_and_stay(images: ImageFormat, tmp_path: Path) -> None:
    write_dump(images, tmp_path, [(False, "zero")] * 50)

    done = compact(images, tmp_path, threads=1)

    assert done.after == done.before == 50 * PAGE


def test_runs_whose_pages_lie_in_a_parent_image_take_no_bytes(images: ImageFormat, tmp_path: Path) -> None:
    write_dump(images, tmp_path, [(True, "zero")] * 20)
    runs = [PageRun(BASE - PAGE, 1, PAGE_IN_PARENT), PageRun(BASE, 20, PAGE_PRESENT)]
    images.write_pagemap(tmp_path / "pagemap-1.img", 1, runs)

    compact(images, tmp_path, threads=1)

    assert images.read_pagemap(tmp_path / "pagemap-1.img") == (1, runs[:1])


@pytest.mark.parametrize("damage", ["short", "missing", "no inventory"])
def test_an_incomplete_dump_is_refused_by_name(images: ImageFormat, tmp_path: Path, damage: str) -> None:
    write_dump(images, tmp_path, [(True, "data")] * 5)
    pages = tmp_path / "pages-1.img"
    if damage == "short":
        pages.write_bytes(pages.read_bytes()[:-1])
    elif damage == "missing":
        pages.unlink()
    else:
        (tmp_path / "inventory.img").unlink()

    with pytest.raises(DataLoss) as refusal:
        check(images, tmp_path)
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
    with pytest.raises(DataLoss, match="ends in the middle"):
        images.read_pagemap(path)

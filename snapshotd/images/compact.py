"""Rewrite an image so that a restore has little to read: zero pages dropped, the rest to be mapped.

Up to half of a model host's touched memory is zeros, and a restore is bound by the pages that it reads.
``layout`` decides where every page goes; this module looks at the pages and moves them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dumont.errors import DataLoss
from snapshotd.images.format import PAGE, ImageFormat
from snapshotd.images.layout import Flags, Layout, Piece, Source, lay_out
from snapshotd.shim.mounts import MEMORY_MOUNT

# Pages looked at together: small enough for the cache, large enough that Python does not matter.
BLOCK = 2048
WORDS = PAGE // 8
# Bytes copied at once by one thread.
CHUNK = 8 << 20


@dataclass(frozen=True)
class Compacted:
    """What compaction did, in bytes."""

    before: int
    after: int


@dataclass(frozen=True)
class _Process:
    """One process of an image, and its new layout."""

    name: str
    pages_id: int
    layout: Layout
    origin: str

    @property
    def memory_file(self) -> str:
        return f"memory-{self.name}.img"


def compact(images: ImageFormat, directory: Path, origin: Path | None, threads: int) -> Compacted:
    """Rewrite the memory of every process in ``directory``, in place.

    Args:
        origin: holds the memory files that the processes were restored from; None: they were started.

    Raises:
        DataLoss: the dump is incomplete.
    """
    known = images.memory_files(directory, MEMORY_MOUNT)
    processes = [
        _look(images, directory, pagemap, known, threads)
        for pagemap in sorted(directory.glob("pagemap-[0-9]*.img"))
    ]
    before = after = 0
    for process in processes:
        pages = directory / f"pages-{process.pages_id}.img"
        before += pages.stat().st_size
        memory = directory / process.memory_file
        _move(process, pages, memory, origin, threads)
        read = [piece.run for piece in process.layout.read]
        images.write_pagemap(directory / f"pagemap-{process.name}.img", process.pages_id, read)
        after += pages.stat().st_size + memory.stat().st_blocks * 512
    sizes = {process.memory_file: process.layout.memory_pages * PAGE for process in processes}
    ids = images.replace_memory_files(directory, MEMORY_MOUNT, sizes)
    for process in processes:
        mm = directory / f"mm-{process.name}.img"
        images.write_vmas(mm, process.layout.vmas, ids[process.memory_file])
    return Compacted(before, after)


def check(images: ImageFormat, directory: Path) -> None:
    """Check that every pagemap in ``directory`` describes its pages file exactly.

    Raises:
        DataLoss: a file is missing, cut short or of another dump.
    """
    names = {path.name for path in directory.iterdir()}
    pagemaps = sorted(directory.glob("pagemap-[0-9]*.img"))
    if not pagemaps or not {"inventory.img", "pstree.img"} <= names:
        raise DataLoss("IMAGE_INCOMPLETE", "the dump lacks its inventory, process tree or memory")
    for pagemap in pagemaps:
        pages_id, runs = images.read_pagemap(pagemap)
        name = f"pages-{pages_id}.img"
        expected = sum(run.pages for run in runs if run.present) * PAGE
        actual = (directory / name).stat().st_size if name in names else -1
        if actual != expected:
            raise DataLoss(
                "IMAGE_INCOMPLETE",
                f"{name} has {actual} bytes and its map describes {expected}",
                metadata={"file": name},
            )


def _look(
    images: ImageFormat, directory: Path, pagemap: Path, known: dict[int, str], threads: int
) -> _Process:
    name = pagemap.stem.removeprefix("pagemap-")
    pages_id, runs = images.read_pagemap(pagemap)
    vmas = images.read_vmas(directory / f"mm-{name}.img", known)
    nonzero = np.empty(0, dtype=bool)
    with (directory / f"pages-{pages_id}.img").open("rb") as pages:
        if os.fstat(pages.fileno()).st_size:
            with mmap.mmap(pages.fileno(), 0, prot=mmap.PROT_READ) as memory:
                nonzero = _nonzero_pages(memory, threads)
    origins = {known[vma.entry.shmid] for vma in vmas if vma.entry.shmid in known}
    return _Process(name, pages_id, lay_out(vmas, runs, nonzero), origins.pop() if origins else "")


def _nonzero_pages(memory: mmap.mmap, threads: int) -> Flags:
    """For each page of ``memory``, whether any byte of it is not zero; shape (pages,)."""
    pages = len(memory) // PAGE
    result = np.empty(pages, dtype=bool)

    def look(start: int) -> None:
        # A view of its own: the mapping cannot be closed while an array looks at it.
        count = min(BLOCK, pages - start)
        block = np.frombuffer(memory, np.uint64, count * WORDS, start * PAGE).reshape(count, WORDS)
        # Most pages that are not zero show it in their first words.
        found: Flags = np.asarray(block[:, :8].any(axis=1))
        rest = np.flatnonzero(~found)
        found[rest] = block[rest].any(axis=1)
        result[start : start + count] = found
        # What was looked at stays in the page cache and need not count as memory of this process.
        memory.madvise(mmap.MADV_DONTNEED, start * PAGE, count * PAGE)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(look, range(0, pages, BLOCK)))
    return result


def _move(process: _Process, pages: Path, memory: Path, origin: Path | None, threads: int) -> None:
    """Write the new pages file, over the old one, and the memory file."""
    scratch = pages.with_suffix(".new")
    layout = process.layout
    with ExitStack() as stack:
        sources = {Source.DUMP: stack.enter_context(pages.open("rb")).fileno()}
        if process.origin and origin is not None:
            sources[Source.ORIGIN] = stack.enter_context((origin / process.origin).open("rb")).fileno()
        target = stack.enter_context(scratch.open("wb")).fileno()
        mapped = stack.enter_context(memory.open("wb")).fileno()
        os.truncate(mapped, layout.memory_pages * PAGE)
        _copy(sources, target, _one_behind_the_other(layout.read), threads)
        _copy(sources, mapped, layout.mapped, threads)
    scratch.replace(pages)


def _one_behind_the_other(pieces: Iterable[Piece]) -> Iterator[tuple[int, Piece]]:
    end = 0
    for piece in pieces:
        if piece.source is not Source.ELSEWHERE:
            yield end, piece
            end += piece.run.pages


def _copy(sources: dict[Source, int], target: int, places: Iterable[tuple[int, Piece]], threads: int) -> None:
    """Copy pages to their places in ``target``, several pieces at once."""

    def work(job: tuple[int, int, int, int]) -> None:
        source, offset, place, length = job
        while length:
            copied = os.copy_file_range(source, target, length, offset, place)
            if copied == 0:
                raise DataLoss("IMAGE_INCOMPLETE", "the pages file ended early")
            offset, place, length = offset + copied, place + copied, length - copied

    jobs = [
        (
            sources[piece.source],
            piece.position * PAGE + start,
            place * PAGE + start,
            min(CHUNK, length - start),
        )
        for place, piece in places
        for length in (piece.run.pages * PAGE,)
        for start in range(0, length, CHUNK)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, jobs, chunksize=1))

"""Rewrite an image so that a restore has little to read: drop zero pages, and let the others be mapped.

Up to half of the memory that a model host has touched is zeros, and the time of a restore depends on the
pages that it reads. ``layout`` decides where every page goes. This module examines the pages and copies them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dumont.errors import DataLoss
from snapshotd.images.format import PAGE, ImageFormat, Kind, Vma
from snapshotd.images.layout import Flags, Layout, Piece, Source, lay_out
from snapshotd.system.mounts import MEMORY_MOUNT

# Pages examined at a time: few enough for the CPU's cache, and enough that Python's overhead does not matter.
BLOCK = 512
# More threads are no faster, because memory is the limit.
MOST_THREADS = 8
WORDS = PAGE // 8
# FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PUNCH_HOLE = 0x03


@dataclass(frozen=True)
class Compacted:
    """The bytes of an image before and after its compaction."""

    before: int
    after: int


@dataclass(frozen=True)
class _Process:
    """One process of an image, and its new layout.

    Attributes:
        origin: the memory file that it was restored from; empty if it was started.
    """

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
        origin: holds the memory files that the processes were restored from; None if they were started.

    Raises:
        DataLoss: IMAGE_INCOMPLETE or IMAGE_DAMAGED.
    """
    known = images.memory_files(directory, MEMORY_MOUNT)
    processes = [
        _analyze(images, directory, pagemap, known, threads)
        for pagemap in sorted(directory.glob("pagemap-[0-9]*.img"))
    ]
    before = after = 0
    for process in processes:
        pages = directory / f"pages-{process.pages_id}.img"
        before += pages.stat().st_size
        memory = directory / process.memory_file
        _rewrite(process, pages, memory, origin)
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
    """Check that pagemaps describe their pages files exactly and that no mapping exceeds its memory file.

    Raises:
        DataLoss: IMAGE_INCOMPLETE, a file is missing, cut short or of another dump.
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
    known = images.memory_files(directory, MEMORY_MOUNT)
    for mm in sorted(directory.glob("mm-[0-9]*.img")):
        for vma in images.read_vmas(mm, known):
            if vma.kind is Kind.MAPPED:
                _check_mapping(vma, directory / known[vma.entry.shmid])


def _check_mapping(vma: Vma, file: Path) -> None:
    size = file.stat().st_size if file.exists() else -1
    if vma.offset + vma.end - vma.start > size:
        raise DataLoss(
            "IMAGE_INCOMPLETE",
            f"{file.name} has {size} bytes, and memory is mapped from beyond them",
            metadata={"file": file.name},
        )


def _analyze(
    images: ImageFormat, directory: Path, pagemap: Path, known: dict[int, str], threads: int
) -> _Process:
    name = pagemap.stem.removeprefix("pagemap-")
    pages_id, runs = images.read_pagemap(pagemap)
    vmas = images.read_vmas(directory / f"mm-{name}.img", known)
    with (directory / f"pages-{pages_id}.img").open("rb") as pages:
        nonzero = _nonzero_pages(pages.fileno(), threads)
    origins = {known[vma.entry.shmid] for vma in vmas if vma.kind is Kind.MAPPED}
    if len(origins) > 1:
        raise DataLoss("IMAGE_DAMAGED", f"process {name} maps {len(origins)} memory files and can have one")
    return _Process(name, pages_id, lay_out(vmas, runs, nonzero), next(iter(origins), ""))


def _nonzero_pages(file: int, threads: int) -> Flags:
    """For each page of ``file``, whether any byte of it is not zero; shape (pages,).

    The file is read and not mapped, because changing an address space that many threads share costs more than
    copying the pages.
    """
    pages = os.fstat(file).st_size // PAGE
    result = np.empty(pages, dtype=bool)
    threads = min(threads, MOST_THREADS)

    def look(worker: int) -> None:
        block = np.empty((BLOCK, WORDS), np.uint64)
        for start in range(worker * BLOCK, pages, threads * BLOCK):
            count = min(BLOCK, pages - start)
            _fill(file, start * PAGE, block[:count].data.cast("B"))
            # The first words of most pages with data are not all zero.
            found: Flags = np.asarray(block[:count, :8].any(axis=1))
            rest = np.flatnonzero(~found)
            found[rest] = block[rest].any(axis=1)
            result[start : start + count] = found

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(look, range(threads)))
    return result


def _fill(file: int, offset: int, view: memoryview) -> None:
    while view:
        got = os.preadv(file, [view], offset)
        if got == 0:
            raise DataLoss("IMAGE_INCOMPLETE", "the pages file ended early")
        offset, view = offset + got, view[got:]


def _rewrite(process: _Process, pages: Path, memory: Path, origin: Path | None) -> None:
    """Turn the dump's pages file into the memory file, and copy what a restore reads to a new pages file."""
    layout = process.layout
    dumped = pages.stat().st_size // PAGE
    pages.rename(memory)
    with ExitStack() as stack:
        sources = {Source.DUMP: stack.enter_context(memory.open("r+b")).fileno()}
        if process.origin:
            if origin is None:
                raise DataLoss("IMAGE_INCOMPLETE", f"{process.origin} was mapped from an unknown directory")
            sources[Source.ORIGIN] = stack.enter_context((origin / process.origin).open("rb")).fileno()
        target = stack.enter_context(pages.open("xb")).fileno()
        mapped = sources[Source.DUMP]
        _copy(sources, target, _one_behind_the_other(layout.read))
        os.truncate(mapped, layout.memory_pages * PAGE)
        for source in (Source.ORIGIN, Source.DUMP):  # pages that the process has written replace the original
            added = [(place, piece) for place, piece in layout.added if piece.source is source]
            _copy(sources, mapped, added)
        for first, count in _gaps(layout.kept, dumped):
            _punch(mapped, first * PAGE, count * PAGE)


def _one_behind_the_other(pieces: Iterable[Piece]) -> Iterator[tuple[int, Piece]]:
    end = 0
    for piece in pieces:
        if piece.source is not Source.ELSEWHERE:
            yield end, piece
            end += piece.run.pages


def _gaps(ranges: Iterable[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """The ranges (first, count) below ``end`` that none of the ascending ``ranges`` covers."""
    position = 0
    for first, count in [*ranges, (end, 0)]:
        if first > position:
            yield position, first - position
        position = first + count


def _punch(file: int, offset: int, length: int) -> None:
    """Make a range of a file a hole, which takes no space and reads as zeros."""
    if _libc().fallocate(file, PUNCH_HOLE, offset, length) != 0:
        error = ctypes.get_errno()
        # A file system without holes keeps the bytes, which nothing maps.
        if error != errno.EOPNOTSUPP:
            raise OSError(error, os.strerror(error))


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library


def _copy(sources: dict[Source, int], target: int, places: Iterable[tuple[int, Piece]]) -> None:
    """Copy pages to their places in ``target``. One thread does it, because writers to a file take turns."""
    for place, piece in places:
        source, offset, to = sources[piece.source], piece.position * PAGE, place * PAGE
        length = piece.run.pages * PAGE
        while length:
            copied = os.copy_file_range(source, target, length, offset, to)
            if copied == 0:
                raise DataLoss("IMAGE_INCOMPLETE", "the pages file ended early")
            offset, to, length = offset + copied, to + copied, length - copied

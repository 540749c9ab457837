"""Drop the zero pages of an image.

Up to half of a model host's touched memory is zeros. CRIU writes and restores them like any page, and
a restore is bound by exactly that. An image without them restores to the same memory, as long as they
are dropped only from private anonymous memory, where absence means zero.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dumont.errors import DataLoss
from snapshotd.images.format import PAGE, ImageFormat, PageRun

# Pages looked at together: small enough for the cache, large enough that Python does not matter.
BLOCK = 2048
WORDS = PAGE // 8
# Bytes copied at once by one thread.
PIECE = 8 << 20
# A gap of fewer zero pages than this is kept: a restore pays more for another run than for its pages.
SMALLEST_GAP = 4
# An image that would keep more than this share of its pages stays as it is.
WORTH_REWRITING = 0.98


Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Compacted:
    """What compaction did, in bytes."""

    before: int
    after: int


def compact(images: ImageFormat, directory: Path, threads: int) -> Compacted:
    """Rewrite the pages of every process in ``directory`` without its zero pages, in place."""
    before = after = 0
    for pagemap in sorted(directory.glob("pagemap-[0-9]*.img")):
        process = pagemap.stem.removeprefix("pagemap-")
        pages_id, runs = images.read_pagemap(pagemap)
        anonymous = images.read_anonymous(directory / f"mm-{process}.img")
        pages = directory / f"pages-{pages_id}.img"
        before += pages.stat().st_size
        kept = _rewrite(pages, runs, anonymous, threads)
        images.write_pagemap(pagemap, pages_id, kept)
        after += pages.stat().st_size
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


def _rewrite(
    pages: Path, runs: Sequence[PageRun], anonymous: Sequence[tuple[int, int]], threads: int
) -> list[PageRun]:
    if pages.stat().st_size == 0:
        return list(runs)
    scratch = pages.with_suffix(".compact")
    with pages.open("rb") as source, scratch.open("wb") as target:
        with mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as memory:
            nonzero = _nonzero_pages(memory, threads)
        kept = list(_split(runs, anonymous, nonzero))
        if sum(run.pages for run, page in kept if page >= 0) > WORTH_REWRITING * len(nonzero):
            scratch.unlink()
            return list(runs)
        _copy(source.fileno(), target.fileno(), kept, threads)
    scratch.replace(pages)
    return [run for run, _ in kept]


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


def _split(
    runs: Sequence[PageRun], anonymous: Sequence[tuple[int, int]], nonzero: Flags
) -> Iterator[tuple[PageRun, int]]:
    """The runs to keep, each with the index of its first page in the old pages file."""
    starts = [start for start, _ in anonymous]
    position = 0
    for run in runs:
        if not run.present:
            yield run, -1
            continue
        for piece, droppable in _by_memory(run, anonymous, starts):
            if droppable:
                for first, count in _kept_ranges(nonzero[position : position + piece.pages]):
                    yield replace(piece, start=piece.start + first * PAGE, pages=count), position + first
            else:
                yield piece, position
            position += piece.pages
    if position != len(nonzero):
        raise DataLoss(
            "IMAGE_INCOMPLETE", f"the map describes {position} pages and the file has {len(nonzero)}"
        )


def _by_memory(
    run: PageRun, anonymous: Sequence[tuple[int, int]], starts: Sequence[int]
) -> Iterator[tuple[PageRun, bool]]:
    """Cut a run at the borders of anonymous memory; True for the pieces inside it."""
    address, end = run.start, run.start + run.pages * PAGE
    while address < end:
        index = bisect_right(starts, address) - 1
        inside = index >= 0 and address < anonymous[index][1]
        if inside:
            stop = min(end, anonymous[index][1])
        else:
            stop = min(end, starts[index + 1]) if index + 1 < len(starts) else end
        yield replace(run, start=address, pages=(stop - address) // PAGE), inside
        address = stop


def _kept_ranges(nonzero: Flags) -> Iterator[tuple[int, int]]:
    """Ranges (first, count) that cover every True, joined over gaps too short to be worth a run."""
    pages = np.flatnonzero(nonzero)
    if len(pages) == 0:
        return
    breaks = np.flatnonzero(np.diff(pages) > SMALLEST_GAP)
    firsts = pages[np.concatenate(([0], breaks + 1))]
    lasts = pages[np.concatenate((breaks, [len(pages) - 1]))]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield first, last - first + 1


def _copy(source: int, target: int, kept: Sequence[tuple[PageRun, int]], threads: int) -> None:
    """Copy the pages of every run to its place in the new file, several pieces at once."""
    pieces: list[tuple[int, int, int]] = []
    end = 0
    for run, page in kept:
        if page < 0:
            continue
        for start in range(0, run.pages * PAGE, PIECE):
            length = min(PIECE, run.pages * PAGE - start)
            pieces.append((page * PAGE + start, end + start, length))
        end += run.pages * PAGE
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: _copy_piece(source, target, *piece), pieces))


def _copy_piece(source: int, target: int, offset: int, place: int, length: int) -> None:
    while length:
        copied = os.copy_file_range(source, target, length, offset, place)
        if copied == 0:
            raise DataLoss("IMAGE_INCOMPLETE", "the pages file ended early")
        offset, place, length = offset + copied, place + copied, length - copied

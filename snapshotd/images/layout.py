"""Decide for each page of a captured process: drop it, map it from a memory file, or read it at restore.

A restore that reads memory pays for every page. A restore that maps it pays only for the pages that the
process touches later, and the kernel reads sixteen of them at a time. So ranges that are large enough go to a
memory file, and only small ones are left to read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dumont.errors import DataLoss
from snapshotd.images.format import PAGE, PAGE_PRESENT, Kind, PageRun, Vma

# A gap of at most this many zero pages is kept: another mapping would cost a restore more than these pages.
LARGEST_GAP: Final = 8
# The fewest pages that are worth a mapping.
SMALLEST_MAPPING: Final = 16
# The kernel allows a process 65,530 mappings (vm.max_map_count), some of which the process needs for itself.
# SmolLM2 on the CPU gets 900 from this layout, a 7.6B model on a GPU not many more.
MOST_MAPPINGS: Final = 16_000

Flags = NDArray[np.bool_]


class Source(Enum):
    """The file that pages are copied or mapped from."""

    DUMP = auto()  # the dump's pages file
    ORIGIN = auto()  # the memory file that the process itself was restored from
    ELSEWHERE = auto()  # not in this image


@dataclass(frozen=True)
class Piece:
    """Pages with consecutive addresses that are also consecutive in their source.

    Attributes:
        run: their addresses.
        position: the place of the first page in the source, in pages.
    """

    run: PageRun
    source: Source
    position: int


@dataclass(frozen=True)
class Layout:
    """The new layout of a process's memory. The pages file of the dump becomes its memory file.

    Attributes:
        vmas: the mappings of the process.
        read: the pieces that a restore reads, in ascending order.
        added: the pieces that are copied into the memory file, each with its place there, in pages. Those
            from the dump are written after, and over, those from the origin.
        kept: ranges (first, count) of pages of the dump that are mapped where they are, in ascending order.
        memory_pages: the size of the memory file, in pages.
    """

    vmas: list[Vma]
    read: list[Piece]
    added: list[tuple[int, Piece]]
    kept: list[tuple[int, int]]
    memory_pages: int


def lay_out(vmas: Sequence[Vma], runs: Sequence[PageRun], nonzero: Flags) -> Layout:
    """Make the layout of a process's memory.

    Args:
        vmas: the mappings, in ascending order.
        runs: in the order of the pages file, which is ascending.
        nonzero: for each page of the pages file, whether any of its bytes is not zero.

    Raises:
        DataLoss: IMAGE_INCOMPLETE, the runs describe another number of pages.
    """
    coarseness = 1
    while True:
        layout = _lay_out(vmas, runs, nonzero, coarseness)
        # Memory with very many holes is cut more coarsely, or finally not at all.
        if len(layout.vmas) <= max(MOST_MAPPINGS, len(vmas)) or coarseness > len(nonzero):
            return layout
        coarseness *= 2


def _lay_out(vmas: Sequence[Vma], runs: Sequence[PageRun], nonzero: Flags, coarseness: int) -> Layout:
    """:func:`lay_out`, with limits for gaps and mappings that are multiplied by ``coarseness``."""
    starts = [vma.start for vma in vmas]
    layout = Layout([], [], [], [], len(nonzero))
    regions: dict[int, list[tuple[int, int, int]]] = {}
    written: dict[int, list[Piece]] = {}
    position = 0
    for run in runs:
        if not run.present:
            layout.read.append(Piece(run, Source.ELSEWHERE, 0))
            continue
        for part, index in _by_vma(run, vmas, starts):
            kind = vmas[index].kind if index >= 0 else Kind.OTHER
            if kind is Kind.OTHER:
                layout.read.append(Piece(part, Source.DUMP, position))
            elif kind is Kind.MAPPED:
                written.setdefault(index, []).append(Piece(part, Source.DUMP, position))
            else:
                for first, count in _kept_ranges(nonzero[position : position + part.pages], coarseness):
                    kept = replace(part, start=part.start + first * PAGE, pages=count)
                    if kind is Kind.ANONYMOUS and count >= SMALLEST_MAPPING * coarseness:
                        end = kept.start + count * PAGE
                        regions.setdefault(index, []).append((kept.start, end, (position + first) * PAGE))
                        layout.kept.append((position + first, count))
                    else:
                        layout.read.append(Piece(kept, Source.DUMP, position + first))
            position += part.pages
    if position != len(nonzero):
        raise DataLoss(
            "IMAGE_INCOMPLETE", f"the map describes {position} pages and the file has {len(nonzero)}"
        )
    end = len(nonzero)
    for index, vma in enumerate(vmas):
        if vma.kind is Kind.MAPPED:
            # Assembled at the end of the file: the memory it was restored from, then the pages it has
            # written.
            pages = (vma.end - vma.start) // PAGE
            whole = Piece(PageRun(vma.start, pages, PAGE_PRESENT), Source.ORIGIN, vma.offset // PAGE)
            layout.added.append((end, whole))
            for piece in written.get(index, []):
                layout.added.append((end + (piece.run.start - vma.start) // PAGE, piece))
            regions[index] = [(vma.start, vma.end, end * PAGE)]
            end += pages
        layout.vmas.extend(_cut(vma, regions.get(index, [])))
    return replace(layout, memory_pages=end)


def _by_vma(run: PageRun, vmas: Sequence[Vma], starts: Sequence[int]) -> Iterator[tuple[PageRun, int]]:
    """Cut a run at the borders of mappings. Each part comes with the index of its mapping, or -1."""
    address, end = run.start, run.start + run.pages * PAGE
    while address < end:
        index = bisect_right(starts, address) - 1
        if index >= 0 and address < vmas[index].end:
            stop = min(end, vmas[index].end)
        else:
            stop = min(end, starts[index + 1]) if index + 1 < len(starts) else end
            index = -1
        yield replace(run, start=address, pages=(stop - address) // PAGE), index
        address = stop


def _kept_ranges(nonzero: Flags, coarseness: int) -> Iterator[tuple[int, int]]:
    """Ranges (first, count) that cover every True, joined across gaps that are too short for a run."""
    pages = np.flatnonzero(nonzero)
    if len(pages) == 0:
        return
    breaks = np.flatnonzero(np.diff(pages) > LARGEST_GAP * coarseness)
    firsts = pages[np.concatenate(([0], breaks + 1))]
    lasts = pages[np.concatenate((breaks, [len(pages) - 1]))]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield first, last - first + 1


def _cut(vma: Vma, regions: Iterable[tuple[int, int, int]]) -> Iterator[Vma]:
    """Cut a mapping into ``regions`` (start, end, offset) of the memory file, and zeros between them."""
    if vma.kind is Kind.ANONYMOUS or vma.kind is Kind.MAPPED:
        address = vma.start
        for start, end, offset in regions:
            if start > address:
                yield replace(vma, start=address, end=start, kind=Kind.ANONYMOUS, offset=0)
            yield replace(vma, start=start, end=end, kind=Kind.MAPPED, offset=offset)
            address = end
        if address < vma.end:
            yield replace(vma, start=address, kind=Kind.ANONYMOUS, offset=0)
    else:
        yield vma

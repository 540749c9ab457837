"""Where each page of a captured process goes: dropped, mapped from a memory file, or read at restore.

A restore that reads memory pays for every page of it. One that maps it pays for the pages that the process
then touches, and the kernel brings sixteen at a time. So whatever is large enough goes to a memory file, and
only crumbs are left to read.
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

# A gap of fewer zero pages than this is kept: a restore pays more for another run than for its pages.
SMALLEST_GAP: Final = 4
# Pages of a hole that a mapping may have inside, and the fewest that are worth a mapping.
LARGEST_HOLE: Final = 16
SMALLEST_MAPPING: Final = 16

Flags = NDArray[np.bool_]


class Source(Enum):
    """Where pages lie before they are laid out."""

    DUMP = auto()  # the dump's pages file
    ORIGIN = auto()  # the memory file that the process itself was restored from
    ELSEWHERE = auto()  # not in this image


@dataclass(frozen=True)
class Piece:
    """Consecutive pages that lie one behind the other in their source.

    Attributes:
        run: their addresses.
        position: the first one's place in the source, in pages.
        vma: index of their mapping; -1: absence would not mean zero, so the piece stays as it is.
    """

    run: PageRun
    source: Source
    position: int
    vma: int

    @property
    def start(self) -> int:
        return self.run.start

    @property
    def end(self) -> int:
        return self.run.start + self.run.pages * PAGE


@dataclass(frozen=True)
class Layout:
    """A process's memory, laid out anew.

    Attributes:
        vmas: its mappings.
        read: what a restore reads, ascending.
        mapped: what it maps, each with its place in the new memory file, in pages.
        memory_pages: size of that file.
    """

    vmas: list[Vma]
    read: list[Piece]
    mapped: list[tuple[int, Piece]]
    memory_pages: int


def lay_out(vmas: Sequence[Vma], runs: Sequence[PageRun], nonzero: Flags) -> Layout:
    """Decide for every page.

    Args:
        vmas: ascending.
        runs: in the order of the pages file, which is ascending.
        nonzero: for each page of the pages file, whether any of its bytes is not zero.

    Raises:
        DataLoss: the runs describe another number of pages.
    """
    read: list[Piece] = []
    mapped: list[tuple[int, Piece]] = []
    regions: dict[int, list[tuple[int, int, int]]] = {}
    end = 0
    for group in _groups(sorted(_pieces(vmas, runs, nonzero), key=lambda piece: piece.start)):
        start, stop = group[0].start, group[-1].end
        vma = group[0].vma
        mappable = vma >= 0 and vmas[vma].kind in (Kind.ANONYMOUS, Kind.MAPPED)
        if mappable and stop - start >= SMALLEST_MAPPING * PAGE:
            regions.setdefault(vma, []).append((start, stop, end * PAGE))
            mapped += [(end + (piece.start - start) // PAGE, piece) for piece in group]
            end += (stop - start) // PAGE
        else:
            read += group
    cut = [part for index, vma in enumerate(vmas) for part in _cut(vma, regions.get(index, []))]
    return Layout(cut, read, mapped, end)


def _pieces(vmas: Sequence[Vma], runs: Sequence[PageRun], nonzero: Flags) -> Iterator[Piece]:
    """All pages that must be somewhere."""
    starts = [vma.start for vma in vmas]
    position = 0
    dumped: dict[int, list[PageRun]] = {}
    for run in runs:
        if not run.present:
            yield Piece(run, Source.ELSEWHERE, 0, -1)
            continue
        for part, index in _by_vma(run, vmas, starts):
            if index < 0 or vmas[index].kind is Kind.OTHER:
                yield Piece(part, Source.DUMP, position, -1)
            else:
                dumped.setdefault(index, []).append(part)
                for first, count in _kept_ranges(nonzero[position : position + part.pages]):
                    kept = replace(part, start=part.start + first * PAGE, pages=count)
                    yield Piece(kept, Source.DUMP, position + first, index)
            position += part.pages
    if position != len(nonzero):
        raise DataLoss(
            "IMAGE_INCOMPLETE", f"the map describes {position} pages and the file has {len(nonzero)}"
        )
    for index, vma in enumerate(vmas):
        if vma.kind is Kind.MAPPED:
            yield from _untouched(vma, index, dumped.get(index, []))


def _untouched(vma: Vma, index: int, dumped: Iterable[PageRun]) -> Iterator[Piece]:
    """What a process has not written to of a mapping of its memory file, so that the dump lacks it."""
    address = vma.start
    for start, end in [*((run.start, run.start + run.pages * PAGE) for run in dumped), (vma.end, vma.end)]:
        if start > address:
            run = PageRun(address, (start - address) // PAGE, PAGE_PRESENT)
            yield Piece(run, Source.ORIGIN, (vma.offset + address - vma.start) // PAGE, index)
        address = end


def _by_vma(run: PageRun, vmas: Sequence[Vma], starts: Sequence[int]) -> Iterator[tuple[PageRun, int]]:
    """Cut a run at the borders of mappings; each part with the index of its own, -1 outside any."""
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


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one mapping that lie close enough together for one region of the memory file."""
    group: list[Piece] = []
    for piece in pieces:
        near = group and piece.start - group[-1].end <= LARGEST_HOLE * PAGE
        if not (near and piece.vma >= 0 and piece.vma == group[0].vma):
            if group:
                yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _cut(vma: Vma, regions: Iterable[tuple[int, int, int]]) -> Iterator[Vma]:
    """A mapping as parts: ``regions`` (start, end, offset) of the memory file, zeros between them."""
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

"""Where the keys and values of sequences lie: extents of one long array of tokens, and whose prefix is
reused.

A sequence has one extent, and moves to a larger one when it has filled it. The extents of sequences that have
ended are kept for later prompts that begin the same way, until their room is needed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Tokens. Extents begin and end at multiples of it, so that freed ones fit again.
GRAIN: Final = 16
# The first extent of the array belongs to nobody: rows that only fill up a batch write there.
FILLER: Final = GRAIN
# Tokens. A shorter common prefix is computed again; copying it would cost as much.
WORTH_SHARING: Final = 16


@dataclass(frozen=True, order=True)
class Extent:
    """``size`` tokens from ``start`` on."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Extents:
    """Hands out extents of an array of ``total`` tokens, first fit."""

    def __init__(self, total: int) -> None:
        self.total = total // GRAIN * GRAIN
        self.used = 0
        self._free: list[Extent] = [Extent(FILLER, self.total - FILLER)] if self.total > FILLER else []

    @property
    def largest(self) -> int:
        """Tokens that one sequence can have when nothing else is there."""
        return max(self.total - FILLER, 0)

    def take(self, tokens: int) -> Extent | None:
        """An extent for at least ``tokens``; None if no gap is as large."""
        size = -(-tokens // GRAIN) * GRAIN
        for index, gap in enumerate(self._free):
            if gap.size >= size:
                if gap.size == size:
                    del self._free[index]
                else:
                    self._free[index] = Extent(gap.start + size, gap.size - size)
                self.used += size
                return Extent(gap.start, size)
        return None

    def give_back(self, extent: Extent) -> None:
        """Free an extent; neighbouring gaps become one."""
        self.used -= extent.size
        at = bisect_left(self._free, extent)
        start, end = extent.start, extent.end
        first, last = at, at
        if at > 0 and self._free[at - 1].end == start:
            start, first = self._free[at - 1].start, at - 1
        if at < len(self._free) and self._free[at].start == end:
            end, last = self._free[at].end, at + 1
        self._free[first:last] = [Extent(start, end - start)]

    def shrink(self, extent: Extent, tokens: int) -> Extent:
        """Free what an extent has beyond ``tokens``; returns what is left of it."""
        size = -(-tokens // GRAIN) * GRAIN
        if size >= extent.size:
            return extent
        self.give_back(Extent(extent.start + size, extent.size - size))
        return Extent(extent.start, size)


@dataclass(eq=False)
class Kept:
    """Tokens whose keys and values are in an extent, from its start on."""

    extent: Extent
    tokens: list[int]


def _tokens(kept: Kept) -> list[int]:
    return kept.tokens


class Prefixes:
    """Extents of sequences that ended, by their first tokens, the least recently used first."""

    def __init__(self) -> None:
        self.tokens = 0  # room that is kept
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        # The same by their tokens. Those that have most in common with given tokens are their neighbours in
        # this order. There may be thousands, and each admission looks for one.
        self._sorted: list[Kept] = []

    def keep(self, extent: Extent, tokens: list[int]) -> Extent | None:
        """Keep what is in ``extent``; returns an extent that is not worth keeping, if there is one."""
        if len(tokens) < WORTH_SHARING:
            return extent
        free = None
        for kept in self._neighbours(tokens):
            shared = common(kept.tokens, tokens)
            if shared == len(tokens):
                self._kept.move_to_end(kept.extent.start)
                return extent
            if shared == len(kept.tokens):
                free = self._forget(kept)
        kept = self._kept[extent.start] = Kept(extent, tokens)
        insort(self._sorted, kept, key=_tokens)
        self.tokens += extent.size
        return free

    def longest(self, tokens: Sequence[int]) -> tuple[Extent, int] | None:
        """The extent with the longest common prefix, and its length; None if none is worth it."""
        found = [(common(kept.tokens, tokens), kept) for kept in self._neighbours(tokens)]
        length, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or length < WORTH_SHARING:
            return None
        self._kept.move_to_end(best.extent.start)
        return best.extent, length

    def evict(self) -> Extent | None:
        """Forget the least recently used. Returns its extent, or None if nothing is kept."""
        return self._forget(next(iter(self._kept.values()))) if self._kept else None

    def _neighbours(self, tokens: Sequence[int]) -> list[Kept]:
        at = bisect_left(self._sorted, list(tokens), key=_tokens)
        return self._sorted[max(at - 1, 0) : at + 1]

    def _forget(self, kept: Kept) -> Extent:
        del self._kept[kept.extent.start]
        del self._sorted[bisect_left(self._sorted, kept.tokens, key=_tokens)]
        self.tokens -= kept.extent.size
        return kept.extent


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their start."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    low, high = 0, most  # the first `low` agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low

"""Where keys and values lie: no token of the cache ever belongs to two sequences, and none is lost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_host.engines.kv import FILLER, GRAIN, WORTH_SHARING, Extent, Extents, Prefixes, common

TOTAL = FILLER + 20 * GRAIN


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 12 * GRAIN)),
            st.tuples(st.just("give back"), st.integers(0, 30)),
        ),
        max_size=60,
    )
)
def test_extents_never_overlap_and_none_is_lost(actions: list[tuple[str, int]]) -> None:
    extents = Extents(TOTAL)
    taken: list[Extent] = []

    for action, number in actions:
        if action == "take":
            extent = extents.take(number)
            if extent is None:
                assert largest_gap(taken) < number
                continue
            assert extent.size >= number
            taken.append(extent)
        elif taken:
            extents.give_back(taken.pop(number % len(taken)))
        assert all(one.end <= other.start for one, other in pairwise(sorted(taken)))
        assert all(extent.start >= FILLER and extent.end <= TOTAL for extent in taken)
        assert extents.used == sum(extent.size for extent in taken)

    for extent in taken:
        extents.give_back(extent)
    assert extents.used == 0
    assert extents.take(extents.largest) == Extent(FILLER, TOTAL - FILLER)


def largest_gap(taken: Sequence[Extent]) -> int:
    edges = [Extent(0, FILLER), *sorted(taken), Extent(TOTAL, 0)]
    return max(other.start - one.end for one, other in pairwise(edges))


def test_a_cache_without_room_has_no_extents() -> None:
    assert Extents(FILLER).largest == 0
    assert Extents(FILLER).take(1) is None


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_what_two_sequences_have_in_common_is_their_start(one: list[int], other: list[int]) -> None:
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))

    assert common(one, other) == len(list(alike))


def kept(prefixes: Prefixes, start: int, tokens: list[int]) -> Extent | None:
    return prefixes.keep(Extent(start, 2 * GRAIN), tokens)


def test_the_longest_common_prefix_is_found() -> None:
    prefixes = Prefixes()
    kept(prefixes, 0, [1] * 40)
    kept(prefixes, 100, [1] * 20 + [2] * 20)

    assert prefixes.longest([1] * 20 + [2] * 5 + [3] * 9) == (Extent(100, 2 * GRAIN), 25)
    assert prefixes.longest([1] * 30) == (Extent(0, 2 * GRAIN), 30)
    assert prefixes.longest([2] * 30) is None
    assert prefixes.longest([1] * (WORTH_SHARING - 1)) is None


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=WORTH_SHARING, max_size=24), max_size=12),
    st.lists(st.integers(0, 1), max_size=30),
)
def test_no_kept_one_has_more_in_common_than_the_one_found(
    all_tokens: list[list[int]], wanted: list[int]
) -> None:
    prefixes = Prefixes()
    for place, tokens in enumerate(all_tokens):
        kept(prefixes, place * 2 * GRAIN, tokens)

    found = prefixes.longest(wanted)

    most = max((common(tokens, wanted) for tokens in all_tokens), default=0)
    assert (found[1] if found else 0) == (most if most >= WORTH_SHARING else 0)


def test_what_is_too_short_is_not_kept() -> None:
    prefixes = Prefixes()

    assert kept(prefixes, 0, [1] * (WORTH_SHARING - 1)) == Extent(0, 2 * GRAIN)
    assert prefixes.evict() is None


def test_what_another_begins_with_is_not_kept_twice() -> None:
    prefixes = Prefixes()
    assert kept(prefixes, 0, [1] * 20) is None

    # The longer one takes the place of the shorter one,
    assert kept(prefixes, 100, [1] * 25) == Extent(0, 2 * GRAIN)
    # and the shorter one does not come back.
    assert kept(prefixes, 200, [1] * 22) == Extent(200, 2 * GRAIN)
    assert prefixes.tokens == 2 * GRAIN
    assert prefixes.longest([1] * 30) == (Extent(100, 2 * GRAIN), 25)


def test_a_search_among_thousands_looks_at_few(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = Prefixes()
    looks = 0

    def counted(one: Sequence[int], other: Sequence[int]) -> int:
        nonlocal looks
        looks += 1
        return common(one, other)

    monkeypatch.setattr("model_host.engines.kv.common", counted)
    system = list(range(100))
    for number in range(2000):
        kept(prefixes, number * 2 * GRAIN, [*system, number, *system])
    looks = 0

    assert prefixes.longest([*system, 700, 5]) == (Extent(700 * 2 * GRAIN, 2 * GRAIN), 101)
    assert looks <= 2


def test_the_least_recently_used_goes_first() -> None:
    prefixes = Prefixes()
    kept(prefixes, 0, [1] * 20)
    kept(prefixes, 100, [2] * 20)
    kept(prefixes, 200, [3] * 20)
    prefixes.longest([1] * 20)
    kept(prefixes, 300, [2] * 18)

    assert [extent.start for extent in iter(prefixes.evict, None)] == [200, 0, 100]


@given(st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=24), max_size=12))
def test_every_extent_is_kept_or_given_back(all_tokens: list[list[int]]) -> None:
    prefixes, extents = Prefixes(), Extents(TOTAL * 4)

    for tokens in all_tokens:
        extent = extents.take(len(tokens) + 1)
        assert extent is not None
        if (free := prefixes.keep(extent, tokens)) is not None:
            extents.give_back(free)
        assert extents.used == prefixes.tokens

    while (evicted := prefixes.evict()) is not None:
        extents.give_back(evicted)
    assert extents.used == prefixes.tokens == 0

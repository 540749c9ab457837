"""Which snapshots leave the node to make room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dumont.errors import ResourceExhausted
from snapshotd.eviction import Candidate, snapshots_to_evict


def held(snapshot: str, size: int, last_use: float, removable: bool = True) -> Candidate:
    return Candidate(snapshot, size, last_use, removable)


def test_nothing_leaves_while_there_is_room() -> None:
    assert snapshots_to_evict([held("a", 60, 1), held("b", 30, 2)], budget=100, needed=10) == []


def test_without_a_budget_nothing_ever_leaves() -> None:
    assert snapshots_to_evict([held("a", 10**12, 1)], budget=0, needed=10**12) == []


def test_the_one_used_longest_ago_leaves_first_and_no_more_than_must() -> None:
    everything = [held("new", 40, 3), held("old", 40, 1), held("middle", 40, 2)]
    assert snapshots_to_evict(everything, budget=120, needed=20) == ["old"]
    assert snapshots_to_evict(everything, budget=120, needed=50) == ["old", "middle"]


def test_what_is_in_use_or_only_here_stays() -> None:
    everything = [held("in use", 50, 1, removable=False), held("other", 50, 2)]
    assert snapshots_to_evict(everything, budget=110, needed=20) == ["other"]


def test_what_cannot_fit_is_refused_and_nothing_leaves_for_it() -> None:
    with pytest.raises(ResourceExhausted) as refusal:
        snapshots_to_evict(
            [held("only here", 90, 1, removable=False), held("other", 10, 2)], budget=100, needed=20
        )
    assert refusal.value.reason == "CACHE_FULL"
    assert refusal.value.metadata == {"needed": "20", "budget": "100"}


def test_a_node_that_holds_too_much_already_lets_go_of_what_it_can() -> None:
    everything = [held("only here", 200, 1, removable=False), held("published", 50, 2)]
    assert snapshots_to_evict(everything, budget=100, needed=0) == ["published"]


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.floats(0, 9), st.booleans()),
        max_size=8,
    ),
    st.integers(1, 200),
    st.integers(0, 60),
)
def test_afterwards_it_fits_and_only_removable_ones_have_left(
    facts: list[tuple[int, float, bool]], budget: int, needed: int
) -> None:
    everything = [held(f"s{number}", *fact) for number, fact in enumerate(facts)]
    try:
        leaving = set(snapshots_to_evict(everything, budget, needed))
    except ResourceExhausted:
        kept = sum(one.size for one in everything if not one.removable)
        assert kept + needed > budget
        return
    stay = [one for one in everything if one.name not in leaving]
    assert all(one.removable for one in everything if one.name in leaving)
    if needed:
        assert sum(one.size for one in stay) + needed <= budget

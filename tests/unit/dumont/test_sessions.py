"""What two controllers say about sessions is merged in any order, and the dead stay dead."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dumont.sessions import Sessions

NUMBERS = st.integers(1, 8)
VIEWS = st.builds(
    lambda highest, living: Sessions(highest, frozenset(n for n in living if n <= highest)),
    NUMBERS,
    st.frozensets(NUMBERS),
)


@given(VIEWS)
def test_it_is_read_as_it_was_written(sessions: Sessions) -> None:
    assert Sessions.parse(str(sessions)) == sessions


@given(VIEWS, VIEWS, VIEWS)
def test_the_order_does_not_matter(one: Sessions, two: Sessions, three: Sessions) -> None:
    assert one.merge(two) == two.merge(one)
    assert one.merge(two).merge(three) == one.merge(two.merge(three))
    assert one.merge(one) == one


@given(VIEWS, VIEWS, NUMBERS)
def test_a_session_has_ended_if_anybody_says_so(one: Sessions, two: Sessions, number: int) -> None:
    assert one.merge(two).ended(number) == (one.ended(number) or two.ended(number))

"""Pages of the List methods: they join to everything, once."""

from __future__ import annotations

import pytest

from dumont.errors import InvalidArgument
from dumont.rpc.pages import LARGEST_PAGE, page


def test_pages_cover_everything_once_even_when_items_come_and_go() -> None:
    items = {f"i{number:02}": number for number in range(25)}
    seen: list[int] = []
    token = ""
    while True:
        shown, token = page(items, 10, token)
        seen += shown
        items.pop("i00", None)
        items["i000"] = -1
        if not token:
            break
    assert seen == list(range(25))


def test_a_page_is_never_larger_than_the_limit() -> None:
    items = {f"{number:05}": number for number in range(LARGEST_PAGE + 1)}
    shown, token = page(items, LARGEST_PAGE + 1, "")
    assert len(shown) == LARGEST_PAGE
    assert token


@pytest.mark.parametrize(
    ("size", "token", "field"), [(-1, "", "page_size"), (0, "é", "page_token"), (0, "a", "page_token")]
)
def test_a_bad_page_is_refused(size: int, token: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        page({"a": 1}, size, token)
    assert failure.value.field == field

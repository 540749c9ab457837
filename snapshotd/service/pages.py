"""Pages of a list (AIP-158)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from dumont.errors import InvalidArgument

Item = TypeVar("Item")
DEFAULT_SIZE = 100
LARGEST_SIZE = 1000


def page(
    items: Sequence[Item], size: int, token: str, key: Callable[[Item], str]
) -> tuple[Sequence[Item], str]:
    """One page of ``items``, which are sorted by ``key``, and the token of the next.

    A token is the key of the last item shown, so items that come and go do not shift the pages.
    """
    if size < 0:
        raise InvalidArgument("INVALID_PAGE_SIZE", "page_size must not be negative", field="page_size")
    rest = [item for item in items if key(item) > token]
    shown = rest[: min(size or DEFAULT_SIZE, LARGEST_SIZE)]
    return shown, key(shown[-1]) if len(rest) > len(shown) else ""

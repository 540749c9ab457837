"""Pages of a list that is ordered by id."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Final, TypeVar

from dumont.errors import InvalidArgument

DEFAULT_PAGE: Final = 100
LARGEST_PAGE: Final = 1000
T = TypeVar("T")


def page(items: Mapping[str, T], size: int, token: str) -> tuple[list[T], str]:
    """The items after ``token`` in the order of their ids, and the token of the next page ("" at the end).

    Args:
        items: by id.
        size: as requested; 0 for the default.
        token: of the page before, "" for the first.

    Raises:
        InvalidArgument: INVALID_PAGE_SIZE or INVALID_PAGE_TOKEN.
    """
    if size < 0:
        raise InvalidArgument("INVALID_PAGE_SIZE", "page_size must not be negative", field="page_size")
    limit = min(size or DEFAULT_PAGE, LARGEST_PAGE)
    after = _decode(token)
    ids = sorted(key for key in items if key > after)
    chosen = ids[:limit]
    following = base64.urlsafe_b64encode(chosen[-1].encode()).decode() if len(ids) > limit else ""
    return [items[key] for key in chosen], following


def _decode(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError) as error:
        raise InvalidArgument(
            "INVALID_PAGE_TOKEN", "page_token is not one that a list returned", field="page_token"
        ) from error

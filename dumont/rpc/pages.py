"""Pages of the List methods (AIP-158)."""

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
    """The items after ``token`` in the order of their keys, and the token of the next page.

    A token holds the key of the last item shown, so items that come and go do not shift the pages.

    Args:
        items: by a key that never changes.
        size: as requested; 0 for the default.
        token: of the previous page, "" for the first.

    Returns:
        The page and the next token, "" at the end.

    Raises:
        InvalidArgument: INVALID_PAGE_SIZE or INVALID_PAGE_TOKEN.
    """
    if size < 0:
        raise InvalidArgument("INVALID_PAGE_SIZE", "page_size must not be negative", field="page_size")
    limit = min(size or DEFAULT_PAGE, LARGEST_PAGE)
    after = _decode(token)
    rest = sorted(key for key in items if key > after)
    shown = rest[:limit]
    following = base64.urlsafe_b64encode(shown[-1].encode()).decode() if len(rest) > limit else ""
    return [items[key] for key in shown], following


def _decode(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError) as error:
        raise InvalidArgument(
            "INVALID_PAGE_TOKEN",
            "page_token must be the next_page_token of an earlier answer",
            field="page_token",
        ) from error

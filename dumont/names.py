"""Build and parse resource names, such as ``deployments/{id}`` and ``snapshots/{id}``."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from difflib import get_close_matches

from dumont.errors import InvalidArgument

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def check_id(value: str, field: str) -> str:
    """Return ``value`` if it is a lower-case RFC 1034 label.

    Raises:
        InvalidArgument: it is not; ``field`` is named.
    """
    if not LABEL.fullmatch(value):
        raise InvalidArgument(
            "INVALID_ID",
            f"{field} must be 1 to 63 lower-case letters, digits and hyphens, beginning with a letter "
            f"and not ending with a hyphen; got {value[:80]!r}",
            field=field,
            metadata={"value": value[:80]},
        )
    return value


def build(collection: str, identifier: str) -> str:
    """``build("deployments", "qa")`` is ``"deployments/qa"``."""
    return f"{collection}/{identifier}"


def parse(name: str, collection: str, field: str) -> str:
    """The id in a resource name of ``collection``, or an id alone.

    Raises:
        InvalidArgument: the name is empty, malformed or of another collection; ``field`` is named.
    """
    prefix, _, identifier = name.partition("/") if "/" in name else (collection, "", name)
    if prefix != collection or not identifier:
        raise InvalidArgument(
            "INVALID_NAME",
            f"{field} must look like {collection}/ID or ID; got {name[:120]!r}",
            field=field,
            metadata={"value": name[:120]},
        )
    return check_id(identifier, field)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the known name that is most like ``name``; empty if none is."""
    by_lower = {other.lower(): other for other in known}
    # What is long is often typed only in part.
    begun = [other for other in by_lower if len(name) > 2 and other.startswith(name.lower())]
    near = get_close_matches(name.lower(), by_lower, 1, 0.7) or begun[:1]
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def new_id(prefix: str) -> str:
    """A new random id that is easy to read in logs: ``prefix-<12 hex digits>``."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"

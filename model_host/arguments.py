"""The arguments of a control command, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dumont.errors import InvalidArgument

MISSING: Final = object()


class Arguments:
    """Reads typed values from a decoded control message.

    Raises, from every method:
        InvalidArgument: BAD_CONTROL_MESSAGE, missing or of the wrong type; the argument is named.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def text(self, name: str, default: object = MISSING) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise _bad(name, "a string")
        return value

    def integer(self, name: str, default: object = MISSING, *, lowest: int) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise _bad(name, f"an integer of at least {lowest}")
        return value

    def number(self, name: str, default: object = MISSING) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
            raise _bad(name, "a number of seconds, 0 or more")
        return float(value)

    def texts(self, name: str) -> dict[str, str]:
        """Strings by name; none when left out."""
        value = self._get(name, {})
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise _bad(name, "an object of strings")
        return value

    def values(self, name: str) -> dict[str, Any]:
        """JSON values by name; none when left out."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise _bad(name, "an object")
        return value

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is None:  # null says the same as leaving it out
            value = default
        if value is MISSING:
            raise _bad(name, "given")
        return value


def _bad(name: str, what: str) -> InvalidArgument:
    return InvalidArgument("BAD_CONTROL_MESSAGE", f"{name} must be {what}", field=name)

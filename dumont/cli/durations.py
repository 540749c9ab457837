"""Durations as people type them: ``30``, ``30s``, ``5m``, ``1h``, ``2d``, ``1h30m``, ``250ms``."""

from __future__ import annotations

import re
from typing import Final

import typer

SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_duration(text: str) -> float:
    """The seconds that ``text`` means; a bare number is seconds.

    Raises:
        typer.BadParameter: it is not a duration.
    """
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise typer.BadParameter(f"{text!r} is not a duration such as 30s, 5m, 1h or a number of seconds")
    return sum(float(number) * SECONDS[unit] for number, unit in parts)

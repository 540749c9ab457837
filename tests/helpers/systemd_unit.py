"""What a unit in deploy/systemd says."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"


def read(name: str) -> dict[str, list[str]]:
    """Every setting of a unit, whatever its section, with its values in order."""
    settings: dict[str, list[str]] = defaultdict(list)
    for line in (UNITS / f"{name}.service").read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            settings[key].append(value)
    return settings


def environment(name: str, state: str) -> dict[str, str]:
    """The variables that a unit sets, with ``state`` where systemd has /var/lib."""
    pairs = (value.replace("%S", state).partition("=") for value in read(name)["Environment"])
    return {variable: value for variable, _, value in pairs}

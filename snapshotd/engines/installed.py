"""The environments that ``dumont engine install`` has made on this node, and which of them is used."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from dumont.engines import parse_version

# In an environment that is complete; written last.
RECORD: Final = "dumont-engine.json"


@dataclass(frozen=True)
class Installed:
    """An environment that is complete.

    Attributes:
        engine: its name.
        version: of the engine.
        build: "cpu" or "cuda".
        directory: of the environment.
        lock: BLAKE3 of the list of packages that it was made from, in hex.
    """

    engine: str
    version: str
    build: str
    directory: Path
    lock: str

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.directory / "bin" / "python"


def write(installed: Installed) -> None:
    """Record that an environment is complete."""
    path = installed.directory / RECORD
    path.write_text(json.dumps(asdict(installed) | {"directory": str(installed.directory)}, indent=1) + "\n")


def read(directory: Path) -> Installed | None:
    """What is recorded of the environment in ``directory``; None if it is not complete or is none of ours."""
    try:
        record = json.loads((directory / RECORD).read_text())
        # Where it is now, not where it was made.
        return Installed(
            str(record["engine"]),
            str(record["version"]),
            str(record["build"]),
            directory,
            str(record["lock"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def found(root: Path) -> list[Installed]:
    """The complete environments below ``root``, by engine, the newest version first."""
    known = [installed for path in root.glob("*/*") if (installed := read(path)) is not None]
    known.sort(key=lambda installed: parse_version(installed.version), reverse=True)
    return sorted(known, key=lambda installed: installed.engine)


def used(known: Iterable[Installed]) -> dict[str, Installed]:
    """Of each engine, the environment that a node uses unless its settings name one: the newest."""
    chosen: dict[str, Installed] = {}
    for installed in known:
        chosen.setdefault(installed.engine, installed)
    return chosen

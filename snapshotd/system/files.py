"""Files that outlive the daemon or the machine: make them durable, and read directories of records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import TypeAdapter, ValidationError

log = structlog.get_logger(__name__)

Record = TypeVar("Record")


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(directory: Path, adapter: TypeAdapter[Record]) -> list[Record]:
    """Read the record in each ``.json`` file of a directory. A file that cannot be read is removed."""
    records = []
    for path in sorted(directory.glob("*.json")):
        try:
            records.append(adapter.validate_json(path.read_bytes()))
        except ValidationError:
            log.warning("record_unreadable", directory=directory.name, file=path.name)
            path.unlink()
    return records

"""A file for each living instance, from which the next daemon learns what to take over."""

from __future__ import annotations

import contextlib
from pathlib import Path

import structlog
from pydantic import TypeAdapter

from snapshotd.model import Instance
from snapshotd.system.files import read_records

log = structlog.get_logger(__name__)

_ADAPTER = TypeAdapter(Instance)


class Journal:
    """Files ``<id>.json`` in one directory. Each is replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, instance: Instance) -> None:
        """Record an instance as it is now."""
        path = self._path(instance.id)
        scratch = path.with_suffix(".new")
        try:
            scratch.write_bytes(_ADAPTER.dump_json(instance))
            # Not synced: the file must outlive the daemon, but not the machine, with which instances end too.
            scratch.replace(path)
        except OSError as error:
            # A full disk must not stop an instance from changing its state. The next daemon asks its host.
            log.error("journal_entry_not_written", path=path.name, error=str(error))
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def forget(self, instance: str) -> None:
        """Remove the record of an instance, if there is one."""
        try:
            self._path(instance).unlink(missing_ok=True)
        except OSError as error:
            # The next daemon finds no process for it.
            log.error("journal_entry_not_removed", instance=instance, error=str(error))

    def read(self) -> list[Instance]:
        """Every instance in the journal. A file that cannot be read is removed."""
        return read_records(self.directory, _ADAPTER)

    def _path(self, instance: str) -> Path:
        return self.directory / f"{instance}.json"

"""A file for each unfinished upload, so that the next daemon resumes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from snapshotd.repository.model import WrappedKey
from snapshotd.system.files import read_records, sync


@dataclass(frozen=True)
class PendingUpload:
    """A snapshot to publish, and the wrapped data key with which its chunks are encrypted, if they are."""

    snapshot: str
    key_id: str = ""
    wrapped: str = ""

    @classmethod
    def of(cls, snapshot: str, key: WrappedKey | None) -> PendingUpload:
        """The entry for an upload with a data key; None if it is not encrypted."""
        return cls(snapshot) if key is None else cls(snapshot, key.key_id, key.wrapped.hex())

    @property
    def key(self) -> WrappedKey | None:
        """The wrapped data key; None if the upload is not encrypted."""
        return WrappedKey(self.key_id, bytes.fromhex(self.wrapped)) if self.key_id else None


_ADAPTER = TypeAdapter(PendingUpload)


class UploadJournal:
    """Files ``<snapshot>.json`` in one directory.

    Each is written before its upload begins, and removed once the manifest is published or the snapshot is
    deleted.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self) -> None:
        """Make the directory."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, upload: PendingUpload) -> None:
        """Write an entry and make it durable."""
        path = self._path(upload.snapshot)
        scratch = path.with_suffix(".new")
        scratch.write_bytes(_ADAPTER.dump_json(upload))
        sync(scratch)
        scratch.replace(path)
        sync(self.directory)

    def remove(self, snapshot: str) -> None:
        """Remove the entry of a snapshot, if there is one."""
        self._path(snapshot).unlink(missing_ok=True)

    def pending(self) -> list[PendingUpload]:
        """Every upload in the journal. An entry that cannot be read is removed."""
        return read_records(self.directory, _ADAPTER)

    def _path(self, snapshot: str) -> Path:
        return self.directory / f"{snapshot}.json"

"""The uploads that are not finished, on disk, so that the next daemon resumes them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from snapshotd.repository.model import SealedKey

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class PendingUpload:
    """A snapshot to publish, and the sealed key that its chunks so far are encrypted with."""

    snapshot: str
    key_id: str = ""
    wrapped: str = ""

    @classmethod
    def of(cls, snapshot: str, key: SealedKey | None) -> PendingUpload:
        return cls(snapshot) if key is None else cls(snapshot, key.key_id, key.wrapped.hex())

    @property
    def key(self) -> SealedKey | None:
        return SealedKey(self.key_id, bytes.fromhex(self.wrapped)) if self.key_id else None


_ADAPTER = TypeAdapter(PendingUpload)


class UploadJournal:
    """Files ``<snapshot>.json`` in one directory: written before an upload begins, removed once its
    manifest is published or the snapshot is deleted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, upload: PendingUpload) -> None:
        path = self._path(upload.snapshot)
        scratch = path.with_suffix(".new")
        with scratch.open("wb") as file:
            file.write(_ADAPTER.dump_json(upload))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, snapshot: str) -> None:
        self._path(snapshot).unlink(missing_ok=True)

    def pending(self) -> list[PendingUpload]:
        """Every upload that was not removed; an entry that cannot be read is removed."""
        uploads = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                uploads.append(_ADAPTER.validate_json(path.read_bytes()))
            except ValidationError:
                log.warning("upload cannot be resumed", entry=path.name)
                path.unlink()
        return uploads

    def _path(self, snapshot: str) -> Path:
        return self.directory / f"{snapshot}.json"

"""The Trust port over a file of trusted keys, which is read again when it has changed."""

from __future__ import annotations

from pathlib import Path

import structlog

from dumont.errors import DumontError, FailedPrecondition
from snapshotd.repository.signing import Signer, TrustedKeys

log = structlog.get_logger(__name__)

Identity = tuple[int, int, int]


class TrustedKeysFile:
    """The keys in a file, and this node's own. A change of the file takes effect without a restart.

    While the file cannot be read, the keys that it last contained stay trusted, because somebody may be
    writing to it.

    Raises:
        FailedPrecondition: the file cannot be read at first, or a line is not a key.
    """

    def __init__(self, path: Path, own: Signer) -> None:
        self._path = path
        self._own = own
        self._seen = self._identify()
        self._keys = self._read()

    @property
    def ids(self) -> frozenset[str]:
        return self._current().ids

    def verify(self, signer: str, document: bytes, signature: bytes) -> None:
        """See :meth:`TrustedKeys.verify`."""
        self._current().verify(signer, document, signature)

    def _current(self) -> TrustedKeys:
        seen = self._identify()
        if seen != self._seen:
            self._seen = seen
            try:
                self._keys = self._read()
            except DumontError as error:
                log.error("trusted_keys_not_reloaded", reason=error.reason, error=error.message)
            else:
                log.info("trusted_keys_reloaded", keys=len(self._keys.ids))
        return self._keys

    def _identify(self) -> Identity | None:
        """The inode, size and time of the file; None if there is no file."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self) -> TrustedKeys:
        try:
            text = self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise FailedPrecondition(
                "KEY_FILE_UNUSABLE",
                f"the file of trusted keys {self._path.name} cannot be read: {error}",
                metadata={"file": self._path.name},
            ) from None
        return TrustedKeys.parse(text, self._own)

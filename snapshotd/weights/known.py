"""The digests of files that have been read before, kept in a file."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import structlog
from blake3 import blake3

log = structlog.get_logger(__name__)


def identify(path: Path) -> str:
    """A digest of a file's path, inode, size and time, which changes if the file is written or replaced."""
    status = path.stat()
    # The change time too: whoever writes may set the other one back, as rsync does.
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    told = f"{path.resolve()} {status.st_ino} {status.st_size} {times}"
    return blake3(told.encode()).hexdigest()


class KnownDigests:
    """The digests of files, by their identity when they were read.

    Args:
        path: the file that keeps them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, identity: str) -> str | None:
        """The digest of the file with this identity; None if it is not known."""
        return self._read().get(identity)

    def remember(self, identity: str, digest: str) -> None:
        """Keep a digest. If that fails, the file is read again next time."""
        known = self._read() | {identity: digest}
        scratch = self.path.with_suffix(".new")
        try:
            scratch.write_text(json.dumps(known))
            scratch.replace(self.path)
        except OSError as error:
            log.warning("digest_not_remembered", path=self.path.name, error=str(error))
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            # A power cut may have left it so. The weights are read again.
            log.warning("remembered_digests_unreadable", path=self.path.name)
            return {}
        return known if isinstance(known, dict) else {}

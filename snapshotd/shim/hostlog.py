"""The log of a model host's output, in two files of bounded size."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

LIMIT = 4 << 20
# Characters of a line that go into a message.
LONGEST_LINE = 300


class HostLog:
    """Appends to ``path``. When that file is full, it is renamed to ``path.1`` and a new one begins."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path = path
        self.limit = limit
        self.fd = self._open()

    def write(self, data: bytes) -> None:
        """Append ``data``, or drop it: a full disk must not end the model host that printed it."""
        with contextlib.suppress(OSError):
            self._write(data)

    def last_line(self) -> str:
        """The last line that is not blank, cut to fit into a message; empty if there is none."""
        try:
            text = self.path.read_bytes()[-64 * LONGEST_LINE :].decode(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines()]
        last = next((line for line in reversed(lines) if line), "")
        return "".join(letter if letter.isprintable() else " " for letter in last[:LONGEST_LINE])

    def _write(self, data: bytes) -> None:
        if os.fstat(self.fd).st_size + len(data) > self.limit:
            self.path.rename(self.path.with_name(self.path.name + ".1"))
            full, self.fd = self.fd, self._open()
            os.close(full)
        os.write(self.fd, data)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

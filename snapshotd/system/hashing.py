"""BLAKE3 of files of any size, in constant memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from blake3 import blake3

# Bytes mapped at a time; mapped bytes count as memory of this process.
WINDOW = 16 << 20


def update_from(hasher: blake3, path: Path) -> None:
    """Add the bytes of a file to a hash."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, WINDOW):
            length = min(WINDOW, size - start)
            with mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ, offset=start) as window:
                hasher.update(window)

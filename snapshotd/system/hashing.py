"""BLAKE3 of files, in memory that does not grow with them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from blake3 import blake3

# Mapped at a time: what is mapped counts as memory of this process.
WINDOW = 16 << 20


def update_from(hasher: blake3, path: Path) -> None:
    """Hash the bytes of a file after what was hashed before."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, WINDOW):
            length = min(WINDOW, size - start)
            with mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ, offset=start) as window:
                hasher.update(window)

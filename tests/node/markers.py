"""Search for a marker as somebody would who has the bytes and no key."""

from __future__ import annotations

import io
import re
from pathlib import Path

import zstandard

FRAME = re.compile(re.escape(zstandard.FRAME_HEADER))


def reads(data: bytes, marker: bytes) -> bool:
    """Whether the marker is in ``data`` as it is, or in anything in it that decompresses."""
    return marker in data or any(marker in _decompressed(data[at.start() :]) for at in FRAME.finditer(data))


def readable(folder: Path, marker: bytes) -> list[str]:
    """Where below ``folder``, in memory or not, the marker can be read; first folders, or files there."""
    found = [path for path in folder.rglob("*") if path.is_file() and reads(path.read_bytes(), marker)]
    return sorted({path.relative_to(folder).parts[0] for path in found})


def _decompressed(frame: bytes) -> bytes:
    """What the first frame holds, as far as it is one."""
    plain = bytearray()
    try:
        for block in zstandard.ZstdDecompressor().read_to_iter(io.BytesIO(frame)):
            plain += block
    except zstandard.ZstdError:
        # The four bytes that begin a frame are also elsewhere.
        pass
    return bytes(plain)

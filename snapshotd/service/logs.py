"""Read the log of a model host while the model host writes to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

POLL_SECONDS = 0.2
BLOCK = 64 << 10


async def read_log(path: Path, tail_lines: int, follow: bool) -> AsyncIterator[bytes]:
    """The last ``tail_lines`` lines (0: all that is kept), and with ``follow`` what comes after.

    Ends when the log is removed, which happens when its instance stops.
    """
    older = path.with_name(path.name + ".1")
    kept = await asyncio.to_thread(lambda: _read(older) + _read(path))
    position = path.stat().st_size if path.exists() else 0
    lines = kept.splitlines(keepends=True)
    for start in range(0, len(text := b"".join(lines[-tail_lines:] if tail_lines > 0 else lines)), BLOCK):
        yield text[start : start + BLOCK]
    while follow and path.exists():
        size = path.stat().st_size
        if size < position:
            # The full log was renamed, and a new one has begun.
            position = 0
        if size > position:
            with path.open("rb") as file:
                file.seek(position)
                data = file.read(BLOCK)
            position += len(data)
            yield data
        else:
            await asyncio.sleep(POLL_SECONDS)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""

"""A process and what descends from it, as the kernel says now."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")


def process_tree(pid: int, proc: Path = PROC) -> list[int]:
    """``pid`` and its living descendants, parents before children."""
    found = [pid]
    for parent in found:
        found.extend(_children(proc / str(parent)))
    return found


def _children(process: Path) -> list[int]:
    try:
        # By thread: each lists the children that it forked itself.
        return sorted(
            int(child) for thread in (process / "task").iterdir() for child in _read(thread / "children")
        )
    except OSError:
        return []


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []

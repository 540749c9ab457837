"""The living descendants of a process."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")


def process_tree(pid: int, proc: Path = PROC) -> list[int]:
    """The pids of a process and its living descendants, parents before children."""
    found = [pid]
    for parent in found:
        found.extend(_children(proc / str(parent)))
    return found


def _children(process: Path) -> list[int]:
    try:
        # Each thread lists only the children that it forked itself.
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

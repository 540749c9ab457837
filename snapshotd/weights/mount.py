"""The tmpfs of the weight cache. It outlives the daemon that mounted it, and the next one finds it."""

from __future__ import annotations

from pathlib import Path

import structlog

from dumont.errors import FailedPrecondition
from snapshotd.system.mounts import WEIGHTS_SOURCE
from snapshotd.system.tmpfs import Tmpfs

log = structlog.get_logger(__name__)

HUGE_PAGE = 2 << 20


def mount(directory: Path, size: int) -> None:
    """Mount the cache at an existing directory, or give it its size if an earlier daemon mounted it.

    Args:
        size: bytes that it may take.

    Raises:
        FailedPrecondition: WEIGHT_CACHE_UNUSABLE.
    """
    tmpfs, options = _tmpfs(directory), f"size={size},mode=0700"
    try:
        if tmpfs.mounted():
            tmpfs.change(options)
        # A kernel that refuses this knows no huge pages in a tmpfs at all.
        elif why := tmpfs.mount(options, "huge=always"):
            log.warning("weights are cached without huge pages", error=why)
    except OSError as error:
        raise FailedPrecondition(
            "WEIGHT_CACHE_UNUSABLE",
            f"no tmpfs of {size} bytes can be had at {directory}: {error}; run without a weight cache "
            "(--weight-cache-bytes 0)",
            metadata={"directory": str(directory), "bytes": str(size)},
        ) from error


def unmount(directory: Path) -> None:
    """Take it away; what is mapped of it stays until nobody maps it any more."""
    _tmpfs(directory).unmount()


def used(directory: Path) -> int:
    """Bytes taken of the mount at ``directory``."""
    return _tmpfs(directory).used()


def mounted(directory: Path) -> bool:
    """Whether a weight cache is mounted at ``directory``."""
    return _tmpfs(directory).mounted()


def _tmpfs(directory: Path) -> Tmpfs:
    return Tmpfs(WEIGHTS_SOURCE, directory)

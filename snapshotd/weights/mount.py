"""The tmpfs of the weight cache, which outlives the daemon and which the next daemon finds again."""

from __future__ import annotations

from pathlib import Path

import structlog

from dumont.errors import FailedPrecondition
from snapshotd.system.mounts import WEIGHTS_SOURCE
from snapshotd.system.tmpfs import Tmpfs

log = structlog.get_logger(__name__)

HUGE_PAGE = 2 << 20


def mount(directory: Path, size: int) -> None:
    """Mount the cache at an existing directory, or resize it if an earlier daemon has mounted it.

    Args:
        size: bytes that its files may take.

    Raises:
        FailedPrecondition: WEIGHT_CACHE_UNUSABLE.
    """
    tmpfs, options = _tmpfs(directory), f"size={size},mode=0700"
    try:
        if tmpfs.mounted():
            tmpfs.change(options)
        # A kernel that refuses this option does not support huge pages in a tmpfs.
        elif why := tmpfs.mount(options, "huge=always"):
            log.warning("weight_cache_without_huge_pages", error=why)
    except OSError as error:
        raise FailedPrecondition(
            "WEIGHT_CACHE_UNUSABLE",
            f"no tmpfs of {size} bytes can be mounted at {directory}: {error}; run without a weight cache "
            "(--weight-cache-bytes 0)",
            metadata={"directory": str(directory), "bytes": str(size)},
        ) from error


def unmount(directory: Path) -> None:
    """Unmount the cache, if it is mounted. Files that are mapped stay until nobody maps them."""
    _tmpfs(directory).unmount()


def used(directory: Path) -> int:
    """Bytes that the files of the cache at ``directory`` take."""
    return _tmpfs(directory).used()


def mounted(directory: Path) -> bool:
    """Whether a weight cache is mounted at ``directory``."""
    return _tmpfs(directory).mounted()


def _tmpfs(directory: Path) -> Tmpfs:
    return Tmpfs(WEIGHTS_SOURCE, directory)

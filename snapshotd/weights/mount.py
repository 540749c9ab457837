"""The tmpfs of the weight cache. It outlives the daemon that mounted it, and the next one finds it."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from dumont.errors import FailedPrecondition
from snapshotd.shim import linux
from snapshotd.shim.mounts import WEIGHTS_SOURCE

log = structlog.get_logger(__name__)

HUGE_PAGE = 2 << 20
FLAGS = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC


def mount(directory: Path, size: int) -> None:
    """Mount the cache at an existing directory, or give it its size if an earlier daemon mounted it.

    Args:
        size: bytes that it may take.

    Raises:
        FailedPrecondition: WEIGHT_CACHE_UNUSABLE.
    """
    options = f"size={size},mode=0700"
    try:
        if mounted(directory):
            linux.mount(WEIGHTS_SOURCE, directory, "tmpfs", FLAGS | linux.MS_REMOUNT, options)
            return
        try:
            linux.mount(WEIGHTS_SOURCE, directory, "tmpfs", FLAGS, f"{options},huge=always")
        except OSError as error:
            # A kernel that refuses this knows no huge pages in a tmpfs at all.
            log.warning("weights are cached without huge pages", error=str(error))
            linux.mount(WEIGHTS_SOURCE, directory, "tmpfs", FLAGS, options)
    except OSError as error:
        raise FailedPrecondition(
            "WEIGHT_CACHE_UNUSABLE",
            f"no tmpfs of {size} bytes can be had at {directory}: {error}; run without a weight cache "
            "(--weight-cache-bytes 0)",
            metadata={"directory": str(directory), "bytes": str(size)},
        ) from error


def unmount(directory: Path) -> None:
    """Take it away; what is mapped of it stays until nobody maps it any more."""
    if mounted(directory):
        linux.unmount(directory)


def used(directory: Path) -> int:
    """Bytes taken of the mount at ``directory``."""
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def mounted(directory: Path) -> bool:
    """Whether a weight cache is mounted at ``directory``."""
    wanted = os.path.realpath(directory)
    with Path("/proc/self/mountinfo").open() as lines:
        for line in lines:
            fields, _, details = line.partition(" - ")
            point = fields.split()[4].encode().decode("unicode_escape")
            if point == wanted and details.split()[:2] == ["tmpfs", WEIGHTS_SOURCE]:
                return True
    return False

"""Images for a node that lacks a mount of the node where they were captured.

A process sees all mounts of its node. Most have nothing to do with it, such as the volumes of other programs.
It can be restored without a mount on which it has no open file.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path

from dumont.errors import FailedPrecondition
from snapshotd.images.format import ImageFormat


def without_mounts(images: ImageFormat, source: Path, absent: AbstractSet[str], target: Path) -> None:
    """Make the directory ``target`` with the images in ``source``, without the mounts at ``absent``.

    Raises:
        FailedPrecondition: MOUNT_MISSING, a process uses a file on such a mount, or another mount is below
            it.
    """
    in_use = images.mounts_in_use(source)
    target.mkdir(mode=0o700)
    for path in source.glob("*.img"):
        if not path.name.startswith("mountpoints-"):
            (target / path.name).symlink_to(path)
            continue
        mounts = images.read_mounts(path)
        kept = [mount for mount in mounts if mount.point not in absent]
        needed = in_use | {mount.parent: mount.point for mount in kept}
        for mount in mounts:
            if mount.point in absent and mount.id in needed:
                raise FailedPrecondition(
                    "MOUNT_MISSING",
                    f"{mount.point} was mounted where the snapshot was captured and is not on this node, and "
                    f"the process uses {needed[mount.id]} there; mount it, or restore elsewhere",
                    metadata={"mount": mount.point, "file": needed[mount.id]},
                )
        images.write_mounts(target / path.name, kept)

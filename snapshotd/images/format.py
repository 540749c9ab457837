"""Read and write CRIU's image files: their framing, and the messages that describe memory, files and mounts.

An image file consists of two little-endian magic numbers and of messages, each preceded by its length (u32).
pycriu's own reader fails with protobuf 7. Its generated messages work, so only the framing is implemented
here. Source: CRIU's ``include/image-desc`` magic list, as shipped in ``pycriu.images.magic``.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from dumont.errors import DataLoss
from snapshotd.system import criu_bindings

PAGE = 4096
# The 32-bit field of a pagemap entry that CRIU 4.2 has replaced.
COUNT_BEFORE_4_2 = "compat_nr_pages"

# Values of CRIU's include/image.h.
VMA_REGULAR = 1 << 0
VMA_FILE_PRIVATE = 1 << 6
VMA_ANON_PRIVATE = 1 << 9
PAGE_IN_PARENT = 1 << 0
PAGE_PRESENT = 1 << 2

# Flags and advice with which an anonymous mapping can become a private file mapping. The kernel accepts
# others, for growing stacks, locked and huge pages, and memory wiped on fork, for anonymous memory only.
MAP_NORESERVE = 0x4000
PLAIN_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_STACK | MAP_NORESERVE
PLAIN_ADVICE = sum(
    1 << advice
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE, mmap.MADV_DONTFORK, mmap.MADV_DONTDUMP)
)


@dataclass(frozen=True)
class PageRun:
    """Consecutive pages of a process, by the address of the first and their number."""

    start: int
    pages: int
    flags: int

    @property
    def present(self) -> bool:
        """Whether their bytes are in the pages file."""
        return bool(self.flags & PAGE_PRESENT)


class Kind(Enum):
    """What a page of a mapping is restored as if the image does not contain it, and how that may change."""

    ANONYMOUS = auto()  # zeros; its pages may be mapped from a file instead
    ZEROS = auto()  # zeros, but the mapping must stay anonymous
    MAPPED = auto()  # the bytes of a memory file
    OTHER = auto()  # other bytes; the mapping must stay as it is


@dataclass(frozen=True)
class Vma:
    """A mapping of a process.

    Attributes:
        start: its first address.
        end: the address after its last.
        offset: where it begins in its memory file, in bytes.
        entry: CRIU's own description.
    """

    start: int
    end: int
    kind: Kind
    offset: int
    entry: Any


@dataclass(frozen=True)
class Mount:
    """A file system mounted at ``point``, below the mount ``parent``; ``entry`` is CRIU's own description."""

    id: int
    parent: int
    point: str
    entry: Any


class ImageFormat:
    """Reads and writes image files with pycriu's messages.

    Args:
        pycriu: directory that holds the package pycriu; None if it is on Python's path.
    """

    def __init__(self, pycriu: Path | None) -> None:
        def load(name: str) -> Any:
            return criu_bindings.load(f"pycriu.images.{name}", pycriu)

        self._pagemap, self._mm = load("pagemap_pb2"), load("mm_pb2")
        self._files, self._mounts = load("fdinfo_pb2"), load("mnt_pb2")
        magic = load("magic")
        self._magic = {
            name: struct.pack("<II", magic.by_name["IMG_COMMON"], magic.by_name[name])
            for name in ("PAGEMAP", "MM", "FILES", "MNTS")
        }

    def read_pagemap(self, path: Path) -> tuple[int, list[PageRun]]:
        """The id of the pages file, and its runs in order."""
        messages = self._messages(path, "PAGEMAP")
        head = self._pagemap.pagemap_head.FromString(messages[0])
        entries = map(self._pagemap.pagemap_entry.FromString, messages[1:])
        return head.pages_id, [PageRun(entry.vaddr, entry.nr_pages, entry.flags) for entry in entries]

    def write_pagemap(self, path: Path, pages_id: int, runs: Iterable[PageRun]) -> None:
        """Write what :meth:`read_pagemap` reads."""
        messages = [self._pagemap.pagemap_head(pages_id=pages_id).SerializeToString()]
        for run in runs:
            entry = self._pagemap.pagemap_entry(vaddr=run.start, nr_pages=run.pages, flags=run.flags)
            if COUNT_BEFORE_4_2 in entry.DESCRIPTOR.fields_by_name:
                # Still required by that version, but ignored.
                setattr(entry, COUNT_BEFORE_4_2, 0)
            messages.append(entry.SerializeToString())
        self._write(path, "PAGEMAP", messages)

    def read_vmas(self, path: Path, memory_files: Iterable[int]) -> list[Vma]:
        """The mappings of a process, in ascending order.

        Args:
            memory_files: ids of the memory files, as :meth:`memory_files` finds them.
        """
        (message,) = self._messages(path, "MM")
        known = set(memory_files)
        return [
            Vma(entry.start, entry.end, _kind(entry, known), entry.pgoff, entry)
            for entry in self._mm.mm_entry.FromString(message).vmas
        ]

    def write_vmas(self, path: Path, vmas: Iterable[Vma], memory_file: int) -> None:
        """Replace the mappings of a process.

        Args:
            memory_file: id of the file from which those of kind ``MAPPED`` are mapped.
        """
        (message,) = self._messages(path, "MM")
        mm = self._mm.mm_entry.FromString(message)
        del mm.vmas[:]
        mm.vmas.extend(_entry(vma, memory_file) for vma in vmas)
        self._write(path, "MM", [mm.SerializeToString()])

    def memory_files(self, directory: Path, mount: str) -> dict[int, str]:
        """The files directly below ``mount`` that the processes had mapped: names by id."""
        entries = map(self._files.file_entry.FromString, self._messages(directory / "files.img", "FILES"))
        prefix = f"{mount}/"
        return {
            entry.id: entry.reg.name.removeprefix(prefix)
            for entry in entries
            if entry.HasField("reg") and entry.reg.name.startswith(prefix)
        }

    def replace_memory_files(self, directory: Path, mount: str, sizes: Mapping[str, int]) -> dict[str, int]:
        """Replace the files below ``mount`` that the image names.

        Args:
            sizes: bytes of each new file, by name.

        Returns:
            The id of each new file, by name.

        Raises:
            DataLoss: IMAGE_INCOMPLETE, the image has no mount there.
        """
        path = directory / "files.img"
        old = self.memory_files(directory, mount)
        entries = [self._files.file_entry.FromString(message) for message in self._messages(path, "FILES")]
        entries = [entry for entry in entries if entry.id not in old]
        mount_id = self._mount_id(directory, mount)
        free = max((entry.id for entry in entries), default=0) + 1
        ids = {name: free + index for index, name in enumerate(sorted(sizes))}
        for name, number in ids.items():
            entry = self._files.file_entry(type=self._files.REG, id=number)
            entry.reg.id = number
            entry.reg.flags = os.O_RDONLY
            entry.reg.pos = 0
            entry.reg.fown.SetInParent()
            for field in ("uid", "euid", "signum", "pid_type", "pid"):
                setattr(entry.reg.fown, field, 0)
            entry.reg.name = f"{mount}/{name}"
            entry.reg.mnt_id = mount_id
            entry.reg.size = sizes[name]
            entries.append(entry)
        self._write(path, "FILES", [entry.SerializeToString() for entry in entries])
        return ids

    def read_mounts(self, path: Path) -> list[Mount]:
        """The mounts of the mount namespace that ``path`` describes."""
        entries = map(self._mounts.mnt_entry.FromString, self._messages(path, "MNTS"))
        return [
            Mount(entry.mnt_id, entry.parent_mnt_id, "/" + entry.mountpoint.lstrip("./"), entry)
            for entry in entries
        ]

    def write_mounts(self, path: Path, mounts: Iterable[Mount]) -> None:
        """Write what :meth:`read_mounts` reads."""
        self._write(path, "MNTS", [mount.entry.SerializeToString() for mount in mounts])

    def mounts_in_use(self, directory: Path) -> dict[int, str]:
        """For each mount on which the processes have open or mapped files, by its id, one of those files."""
        entries = map(self._files.file_entry.FromString, self._messages(directory / "files.img", "FILES"))
        return {entry.reg.mnt_id: entry.reg.name for entry in entries if entry.HasField("reg")}

    def _mount_id(self, directory: Path, point: str) -> int:
        for path in directory.glob("mountpoints-*.img"):
            for mount in self.read_mounts(path):
                if mount.point == point:
                    return mount.id
        raise DataLoss("IMAGE_INCOMPLETE", f"the dump has nothing mounted at {point}")

    def _write(self, path: Path, kind: str, messages: Iterable[bytes]) -> None:
        framed = b"".join(struct.pack("<I", len(message)) + message for message in messages)
        path.write_bytes(self._magic[kind] + framed)

    def _messages(self, path: Path, kind: str) -> Sequence[bytes]:
        data = path.read_bytes()
        if data[:8] != self._magic[kind]:
            raise DataLoss(
                "IMAGE_DAMAGED", f"{path.name} is not a CRIU {kind} image", metadata={"file": path.name}
            )
        messages = []
        position = 8
        while position < len(data):
            (length,) = struct.unpack_from("<I", data, position)
            position += 4
            if position + length > len(data):
                raise DataLoss("IMAGE_DAMAGED", f"{path.name} is cut short", metadata={"file": path.name})
            messages.append(data[position : position + length])
            position += length
        return messages


def _kind(entry: Any, memory_files: set[int]) -> Kind:
    if entry.status & VMA_FILE_PRIVATE and entry.shmid in memory_files:
        return Kind.MAPPED
    if not entry.status & VMA_ANON_PRIVATE:
        return Kind.OTHER
    plain = (
        entry.prot & mmap.PROT_READ
        and not entry.flags & ~PLAIN_FLAGS
        and not entry.madv & ~PLAIN_ADVICE
        and entry.status & VMA_REGULAR
    )
    return Kind.ANONYMOUS if plain else Kind.ZEROS


def _entry(vma: Vma, memory_file: int) -> Any:
    entry = type(vma.entry)()
    entry.CopyFrom(vma.entry)
    entry.start, entry.end = vma.start, vma.end
    if vma.kind is Kind.MAPPED:
        entry.status = VMA_REGULAR | VMA_FILE_PRIVATE
        entry.flags = mmap.MAP_PRIVATE
        entry.shmid, entry.pgoff = memory_file, vma.offset
        entry.fdflags = os.O_RDONLY
    elif vma.kind is Kind.ANONYMOUS and entry.status & VMA_FILE_PRIVATE:
        entry.status = VMA_REGULAR | VMA_ANON_PRIVATE
        entry.flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        entry.shmid = entry.pgoff = 0
        entry.ClearField("fdflags")
    return entry

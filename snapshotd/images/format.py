"""The framing of CRIU's image files, and the two of them that describe memory.

An image file is two little-endian magic numbers, then messages, each behind its length (u32).
pycriu's own reader fails under protobuf 7; its generated messages do not, so only the framing is here.
Source: CRIU's ``include/image-desc`` magic list, as shipped in ``pycriu.images.magic``.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dumont.errors import DataLoss

PAGE = 4096

# Values of CRIU's include/image.h.
VMA_ANON_PRIVATE = 1 << 9
PAGE_IN_PARENT = 1 << 0
PAGE_PRESENT = 1 << 2


@dataclass(frozen=True)
class PageRun:
    """Consecutive pages of a process: where they belong and how many."""

    start: int
    pages: int
    flags: int

    @property
    def present(self) -> bool:
        """True when their bytes are in the pages file."""
        return bool(self.flags & PAGE_PRESENT)


class ImageFormat:
    """Reads and writes image files with pycriu's messages.

    Args:
        pycriu: directory that holds the package pycriu; None: it is on Python's path.
    """

    def __init__(self, pycriu: Path | None) -> None:
        if pycriu is not None and str(pycriu) not in sys.path:
            sys.path.insert(0, str(pycriu))
        self._pagemap: Any = import_module("pycriu.images.pagemap_pb2")
        self._mm: Any = import_module("pycriu.images.mm_pb2")
        magic: Any = import_module("pycriu.images.magic")
        self._magic = {
            name: struct.pack("<II", magic.by_name["IMG_COMMON"], magic.by_name[name])
            for name in ("PAGEMAP", "MM")
        }

    def read_pagemap(self, path: Path) -> tuple[int, list[PageRun]]:
        """The id of the pages file, and the runs in the order in which it holds them."""
        messages = self._messages(path, "PAGEMAP")
        head = self._pagemap.pagemap_head.FromString(messages[0])
        entries = map(self._pagemap.pagemap_entry.FromString, messages[1:])
        return head.pages_id, [PageRun(entry.vaddr, entry.nr_pages, entry.flags) for entry in entries]

    def write_pagemap(self, path: Path, pages_id: int, runs: Iterable[PageRun]) -> None:
        """Write what :meth:`read_pagemap` reads."""
        messages = [self._pagemap.pagemap_head(pages_id=pages_id).SerializeToString()]
        for run in runs:
            entry = self._pagemap.pagemap_entry(vaddr=run.start, nr_pages=run.pages, flags=run.flags)
            messages.append(entry.SerializeToString())
        self._write(path, "PAGEMAP", messages)

    def read_anonymous(self, path: Path) -> list[tuple[int, int]]:
        """Address ranges of a process's private anonymous memory, ascending.

        Only there does a page that is absent from an image come back as zeros. In a private file
        mapping it would come back as the file's bytes.
        """
        (message,) = self._messages(path, "MM")
        vmas = self._mm.mm_entry.FromString(message).vmas
        return sorted((vma.start, vma.end) for vma in vmas if vma.status & VMA_ANON_PRIVATE)

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
                raise DataLoss(
                    "IMAGE_DAMAGED", f"{path.name} ends in the middle", metadata={"file": path.name}
                )
            messages.append(data[position : position + length])
            position += length
        return messages

"""The page server, a process that receives the memory of a dump from CRIU and writes CRIU's memory files.

``python -m snapshotd.images.page_server --socket FD --directory DIR --expect BYTES [--pycriu DIR]``.

On its own, CRIU copies memory into a file page by page, allocating each page at that moment, while the dumped
process is stopped. To a page server it only passes references to the pages. This one copies them into memory
that it has allocated in advance, while CRIU goes on to the next pages. It sends one byte when it is ready, or
the reason why it is not, and ends when the connection ends.

Source of the protocol: CRIU's ``criu/page-xfer.c``.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import os
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from snapshotd.images import PAGE_SERVER_READY
from snapshotd.images.format import PAGE, ImageFormat, PageRun

# Command and flags, number of pages, address, owner. CRIU 4.2 counts pages in 64 bits.
HEADER: Final = struct.Struct("<IIQQ")
LONG_HEADER: Final = struct.Struct("<I4xQQQ")
COMMAND_BITS: Final = 16
OPEN, ADD, CLOSE, FORCE_CLOSE = 4, 6, 0x1023, 0x1024
# The owner of memory: a process by its pid, or shared memory by its id.
KIND_BITS: Final = 8
PROCESS, SHARED = 1, 2

NO_PARENT: Final = b"\0"
DONE: Final = struct.pack("<i", 0)
# From the kernel's mman-common.h; not in the mmap module.
MADV_POPULATE_WRITE: Final = 23
SMALLEST: Final = 16 << 20
MOST_THREADS: Final = 8
_libc = ctypes.CDLL(None, use_errno=True)
ENDED_EARLY: Final = "the connection ended early"


class Broken(Exception):
    """CRIU closed the connection early, or broke the protocol."""


class Memory:
    """The memory of one process, or shared memory.

    Args:
        number: number of its pages file in ``directory``.
        expected: bytes to allocate now. More are allocated when they arrive.

    Raises:
        OSError: there is too little space.
    """

    def __init__(self, directory: Path, number: int, expected: int = 0) -> None:
        self.number = number
        self.name = ""
        self._size = 0
        self._runs: list[PageRun] = []
        self._file = (directory / f"pages-{number}.img").open("x+b")
        # Mapped beyond the expected size, which costs nothing, because moving the mapping later would.
        self._file.truncate(max(2 * expected, SMALLEST))
        self._bytes = mmap.mmap(self._file.fileno(), 0)
        if expected:
            _allocate(self._bytes, expected)
        self._view = memoryview(self._bytes)

    def take(self, connection: socket.socket, run: PageRun) -> None:
        """Receive the pages of ``run``, if their bytes follow."""
        self._runs.append(run)
        end = self._size + (run.pages * PAGE if run.present else 0)
        if end > len(self._bytes):
            self._view.release()
            self._bytes.resize(2 * end)
            self._view = memoryview(self._bytes)
        while self._size < end:
            count = connection.recv_into(self._view[self._size : end])
            if not count:
                raise Broken(ENDED_EARLY)
            self._size += count

    def close(self, images: ImageFormat, directory: Path) -> None:
        """Write its pagemap, if it has an owner."""
        self._file.truncate(self._size)
        if self.name:
            images.write_pagemap(directory / f"pagemap-{self.name}.img", self.number, self._runs)


def _allocate(memory: mmap.mmap, size: int) -> None:
    # An address and no view, with which the mapping could not grow.
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    part = -(-size // (threads * PAGE)) * PAGE

    def populate(offset: int) -> int:
        # Called by ctypes, because the mmap module's own call holds the interpreter's lock.
        length = min(part, size - offset)
        done = _libc.madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(length), MADV_POPULATE_WRITE)
        return ctypes.get_errno() if done else 0

    with ThreadPoolExecutor(threads) as pool:
        for failure in pool.map(populate, range(0, size, part)):
            # A kernel before 5.14 answers EINVAL; its memory is allocated as pages arrive. Other errors mean
            # no space.
            if failure not in (0, errno.EINVAL):
                raise OSError(failure, os.strerror(failure))


def serve(
    connection: socket.socket, load_format: Callable[[], ImageFormat], directory: Path, expected: int
) -> None:
    """Receive a dump, or return if the connection ends without one.

    Args:
        load_format: makes the image format; called after the page server has said that it is ready.
        directory: where the images go.
        expected: bytes of memory of the first process.

    Raises:
        Broken, OSError: the dump failed; its files are useless.
    """
    # CRIU sends shared memory first, so the prepared memory is kept for the first process.
    try:
        prepared = Memory(directory, 1, expected)
    except OSError as error:
        connection.sendall(f"there is no space for {expected} bytes of memory: {error}".encode())
        raise
    memories = [prepared]
    connection.sendall(PAGE_SERVER_READY)
    images = load_format()
    if not connection.recv(1, socket.MSG_PEEK):
        return
    data, header = _receive(connection, HEADER.size), HEADER
    word, *_, whose = HEADER.unpack(data)
    if _command(word) == OPEN and not whose:
        # An opened memory must have an owner, so this is the longer header of CRIU 4.2.
        data, header = data + _receive(connection, LONG_HEADER.size - HEADER.size), LONG_HEADER
    current = prepared
    while True:
        word, pages, address, whose = header.unpack(data)
        command = _command(word)
        if command == OPEN:
            kind, name = _name(whose)
            if kind == PROCESS and not prepared.name:
                current = prepared
            else:
                current = Memory(directory, len(memories) + 1)
                memories.append(current)
            current.name = name
            connection.sendall(NO_PARENT)
        elif command == ADD:
            current.take(connection, PageRun(address, pages, word >> COMMAND_BITS))
        elif command in (CLOSE, FORCE_CLOSE):
            # CRIU sends FORCE_CLOSE also if it refuses the dump before it has sent anything.
            break
        else:
            raise Broken(f"unknown command {command}")
        data = _receive(connection, header.size)
    for memory in memories:
        memory.close(images, directory)
    # On this answer CRIU lets the process run on.
    connection.sendall(DONE)


def _command(word: int) -> int:
    return word & ((1 << COMMAND_BITS) - 1)


def _name(whose: int) -> tuple[int, str]:
    kind, number = whose & ((1 << KIND_BITS) - 1), whose >> KIND_BITS
    if kind not in (PROCESS, SHARED):
        raise Broken(f"unknown kind of memory {kind}")
    return kind, str(number) if kind == PROCESS else f"shmem-{number}"


def _receive(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) != size:
        raise Broken(ENDED_EARLY)
    return data


def main() -> None:
    """The command of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True, help="descriptor of a connection to CRIU")
    parser.add_argument("--directory", type=Path, required=True, help="of the images")
    parser.add_argument("--expect", type=int, required=True, help="bytes of memory to allocate ahead")
    parser.add_argument("--pycriu", type=Path, help="directory of pycriu; left out: the usual path")
    arguments = parser.parse_args()
    with socket.socket(fileno=arguments.socket) as connection:
        try:
            serve(connection, lambda: ImageFormat(arguments.pycriu), arguments.directory, arguments.expect)
        except (Broken, OSError) as error:
            raise SystemExit(f"page server: {error}") from None


if __name__ == "__main__":
    main()

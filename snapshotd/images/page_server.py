"""The page server's process: takes the memory of a dump from CRIU and writes the files that CRIU would write.

``python -m snapshotd.images.page_server --socket FD --directory DIR --expect BYTES [--pycriu DIR]``.

CRIU copies memory into a file page by page, each allocated at that moment, while the process stands still.
To a page server it hands references to the pages; this one copies them into memory that it had allocated
before, beside CRIU, which goes on to the next ones. It says with a byte that it is ready, or why it is not,
and ends with the connection.

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

# Command and flags, pages, address, whose. CRIU 4.2 counts pages in 64 bits.
HEADER: Final = struct.Struct("<IIQQ")
LONG_HEADER: Final = struct.Struct("<I4xQQQ")
COMMAND_BITS: Final = 16
OPEN, ADD, CLOSE, FORCE_CLOSE = 4, 6, 0x1023, 0x1024
# Whose memory follows: a process's by its pid, or shared memory by its id.
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
    """CRIU closed the connection, or says what this does not understand."""


class Memory:
    """The memory of one process, or shared memory: its bytes, and where they belong.

    Args:
        number: of its pages file in ``directory``.
        expected: bytes that are allocated now. More is allocated when it comes.

    Raises:
        OSError: there is no room for them.
    """

    def __init__(self, directory: Path, number: int, expected: int = 0) -> None:
        self.number = number
        self.name = ""
        self._size = 0
        self._runs: list[PageRun] = []
        self._file = (directory / f"pages-{number}.img").open("x+b")
        # Mapped beyond what is expected: it costs nothing where nothing is allocated; moving it later would.
        self._file.truncate(max(2 * expected, SMALLEST))
        self._bytes = mmap.mmap(self._file.fileno(), 0)
        if expected:
            _allocate(self._bytes, expected)
        self._view = memoryview(self._bytes)

    def take(self, connection: socket.socket, run: PageRun) -> None:
        """Receive the pages of ``run``, if there are any."""
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
        """Write its pagemap, if it is somebody's."""
        self._file.truncate(self._size)
        if self.name:
            images.write_pagemap(directory / f"pagemap-{self.name}.img", self.number, self._runs)


def _allocate(memory: mmap.mmap, size: int) -> None:
    # Not held by the mapping, which could not grow then.
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    part = -(-size // (threads * PAGE)) * PAGE

    def populate(offset: int) -> int:
        # The mmap module's own call holds the interpreter's lock.
        length = min(part, size - offset)
        done = _libc.madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(length), MADV_POPULATE_WRITE)
        return ctypes.get_errno() if done else 0

    with ThreadPoolExecutor(threads) as pool:
        for failure in pool.map(populate, range(0, size, part)):
            # A kernel before 5.14 cannot; memory is then allocated as it comes. Others have none.
            if failure not in (0, errno.EINVAL):
                raise OSError(failure, os.strerror(failure))


def serve(
    connection: socket.socket, load_format: Callable[[], ImageFormat], directory: Path, expected: int
) -> None:
    """Take a dump, or return if there is none.

    Args:
        load_format: called when whoever waits for this to be ready waits no more.
        directory: of its images.
        expected: bytes of the first process.

    Raises:
        Broken, OSError: what is there of the dump is of no use.
    """
    # CRIU sends shared memory first, so not whatever comes first is what this is for.
    try:
        prepared = Memory(directory, 1, expected)
    except OSError as error:
        connection.sendall(f"no room for {expected} bytes of memory: {error}".encode())
        raise
    memories = [prepared]
    connection.sendall(PAGE_SERVER_READY)
    images = load_format()
    if not connection.recv(1, socket.MSG_PEEK):
        return
    data, header = _receive(connection, HEADER.size), HEADER
    word, *_, whose = HEADER.unpack(data)
    if _command(word) == OPEN and not whose:
        # What is opened must be somebody's.
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
            # The latter also if CRIU refused the dump before it sent anything.
            break
        else:
            raise Broken(f"unknown command {command}")
        data = _receive(connection, header.size)
    for memory in memories:
        memory.close(images, directory)
    # CRIU lets the process run on when it has this.
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

"""What a dump needs besides the process: CRIU, and a page server that takes the process's memory from it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotd.images import PAGE_SERVER_READY
from snapshotd.shim.criu import CriuFailed, Layout, Worker, dump
from snapshotd.system import linux

# Bytes of references on their way to the page server, so that CRIU need not wait for it. With the kernel's
# 208 KiB, which nobody without CAP_NET_ADMIN may exceed, nothing is gained.
IN_FLIGHT = 64 << 20
SO_SNDBUFFORCE = 32
LONGEST_REASON = 4096


@dataclass
class Dumper:
    """Both, started ahead of time: a process stands still while it is dumped.

    Args:
        binary: CRIU.
        pycriu: the package.
    """

    binary: Path
    pycriu: Any
    # To the page server, until it is ready.
    connection: socket.socket | None = None
    _worker: Worker | None = None
    _pages: int = -1
    _server: subprocess.Popen[bytes] | None = None

    def prepare(self, pid: int, images: Path) -> None:
        """Start the page server for one dump of ``pid`` into the directory ``images``.

        When ``connection`` can be read from, :meth:`complete` is due.
        """
        self.abandon()
        self.connection, theirs = socket.socketpair()
        with theirs:
            self._server = self._start_server(theirs.fileno(), images, linux.anonymous_memory(pid))

    def complete(self) -> None:
        """Start CRIU, once the page server has said that it is ready.

        Raises:
            CriuFailed: it is not, and has ended; what it had allocated is in the directory.
        """
        assert self.connection is not None
        answer = self.connection.recv(LONGEST_REASON)
        if answer != PAGE_SERVER_READY:
            self.abandon()
            raise CriuFailed(answer.decode(errors="replace") or "the page server ended")
        with self.connection as ours:
            self.connection = None
            with contextlib.suppress(PermissionError):
                ours.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, IN_FLIGHT)
            self._pages = ours.fileno()
            self._worker = Worker.start(self.binary, [self._pages])

    def dump(self, pid: int, images: Path, layout: Layout, timeout: float) -> None:
        """As :func:`criu.dump`, into the directory that was prepared.

        Raises:
            CriuFailed: also when none was.
        """
        if self._worker is None:
            raise CriuFailed("no dump was prepared")
        worker, self._worker = self._worker, None
        dump(worker, self.pycriu, pid, images, layout, self._pages, timeout)

    def abandon(self) -> None:
        """There will be no dump; nothing that was prepared for it runs any more."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def reap(self) -> None:
        """Notice that the page server has ended; after a dump nobody waits for it to let go of its memory."""
        if self._server is not None and self._server.poll() is not None:
            self._server = None

    def _start_server(self, connection: int, images: Path, expected: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "snapshotd.images.page_server", "--socket", str(connection)]
        command += ["--directory", str(images), "--expect", str(expected)]
        command += ["--pycriu", str(Path(self.pycriu.__file__).parents[1])]
        return subprocess.Popen(
            command, pass_fds=[connection], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

"""The two processes that a dump needs: CRIU, and a page server that receives the memory from it."""

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

# Size of the send buffer, in bytes of referenced memory, so that CRIU need not wait for the page server. The
# kernel's default of 208 KiB, which only CAP_NET_ADMIN may exceed, would gain nothing.
IN_FLIGHT = 64 << 20
SO_SNDBUFFORCE = 32
LONGEST_REASON = 4096


@dataclass
class Dumper:
    """Starts both processes in advance, because the dumped process is stopped during the dump.

    Args:
        binary: the CRIU program.
        pycriu: the package.

    Attributes:
        connection: to the page server, until it is ready.
    """

    binary: Path
    pycriu: Any
    connection: socket.socket | None = None
    _worker: Worker | None = None
    _pages: int = -1
    _server: subprocess.Popen[bytes] | None = None

    def prepare(self, pid: int, images: Path) -> None:
        """Start the page server for one dump of ``pid`` into the directory ``images``.

        Once ``connection`` is readable, call :meth:`complete`.
        """
        self.abandon()
        self.connection, theirs = socket.socketpair()
        with theirs:
            self._server = self._start_server(theirs.fileno(), images, linux.anonymous_memory(pid))

    def complete(self) -> None:
        """Receive the page server's answer and, if it is ready, start CRIU.

        Raises:
            CriuFailed: the page server has failed. Its files are still in the directory.
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
        """Dump into the prepared directory; see :func:`criu.dump`.

        Raises:
            CriuFailed: the dump failed, or was not prepared.
        """
        if self._worker is None:
            raise CriuFailed("no dump was prepared")
        worker, self._worker = self._worker, None
        dump(worker, self.pycriu, pid, images, layout, self._pages, timeout)

    def abandon(self) -> None:
        """End what was prepared for a dump, if anything."""
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
        """Collect the page server if it has ended. Nobody waits for that after a dump."""
        if self._server is not None and self._server.poll() is not None:
            self._server = None

    def _start_server(self, connection: int, images: Path, expected: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "snapshotd.images.page_server", "--socket", str(connection)]
        command += ["--directory", str(images), "--expect", str(expected)]
        command += ["--pycriu", str(Path(self.pycriu.__file__).parents[1])]
        return subprocess.Popen(
            command, pass_fds=[connection], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

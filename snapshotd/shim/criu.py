"""Dump and restore a model host with CRIU.

``criu swrk`` is started with ``subprocess``, and pycriu only sends requests to it. pycriu's own way of
starting CRIU forks by hand and waits without a deadline.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotd.system import linux

# Level 2 says what went wrong; level 4 writes megabytes.
LOG_LEVEL = 2
# Bytes that a file may have which the process has mapped and nobody can open any more: CRIU puts it into the
# image. Libraries that an engine has compiled for itself are such files, of some hundred kilobytes each.
GHOST_LIMIT = 64 << 20
# From the end of CRIU's connection to that of its process.
ENDING_SECONDS = 1.0


class CriuFailed(Exception):
    """CRIU refused or failed; the message ends with the errors in its log."""


class CriuLost(CriuFailed):
    """CRIU ended without an answer: somebody killed it. Part of what it did may be left."""


class CriuTimeout(CriuFailed):
    """CRIU did not finish in time and was killed."""


@dataclass
class Worker:
    """A ``criu swrk`` that waits for its only request.

    It is started in advance, so that a restore need not wait until CRIU is loaded.
    """

    process: subprocess.Popen[bytes]
    connection: socket.socket

    @classmethod
    def start(cls, binary: Path, keep_fds: Sequence[int] = ()) -> Worker:
        """Start CRIU.

        Args:
            keep_fds: descriptors that it inherits, so that the request can refer to them by number.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [str(binary), "swrk", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), *keep_fds],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return cls(process, ours)

    def close(self) -> None:
        """Kill CRIU."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Layout:
    """The things outside an image that it refers to.

    Attributes:
        mounts: external mounts by name. At dump each path is the model host's, at restore the node's.
        pipes: the inode of each pipe at capture, by role.
    """

    mounts: Mapping[str, Path]
    pipes: Mapping[str, int]


def dump(
    worker: Worker, pycriu: Any, pid: int, images: Path, layout: Layout, pages: int, timeout: float
) -> None:
    """Write the process tree of ``pid`` into the existing directory ``images``; the tree runs on.

    Args:
        pages: a descriptor, open in the worker, of a connection to the page server.
        timeout: seconds that CRIU may take.

    Raises:
        CriuFailed: the tree runs on, unless CRIU had to be killed.
    """
    options = _options(pycriu, layout)
    options.pid = pid
    options.leave_running = True
    options.ps.fd = pages
    _run(worker, pycriu, "dump", options, images, images, timeout)


def restore(
    worker: Worker,
    pycriu: Any,
    images: Path,
    root: Path,
    layout: Layout,
    pipes: Mapping[str, int],
    work: Path,
    timeout: float,
) -> int:
    """Restore the process tree in ``images`` as a child of this process.

    Args:
        root: a bind mount of the node's root, which becomes the root of the tree.
        pipes: descriptors, open in the worker, that replace the captured pipes, by role.
        work: where CRIU's log goes; not ``images``, which other restores read at the same time.
        timeout: seconds that CRIU may take.

    Returns:
        The pid of the tree's root as this process sees it.

    Raises:
        CriuFailed: nothing of the tree is left.
    """
    options = _options(pycriu, layout)
    options.root = str(root)
    # The tree becomes a child of this process and not of CRIU, so that this process can wait for it.
    options.rst_sibling = True
    for role, inode in layout.pipes.items():
        options.inherit_fd.add(key=f"pipe:[{inode}]", fd=pipes[role])
    return int(_run(worker, pycriu, "restore", options, images, work, timeout).pid)


def _options(pycriu: Any, layout: Layout) -> Any:
    options = pycriu.rpc.criu_opts()
    for name, path in layout.mounts.items():
        options.ext_mnt.add(key=name, val=str(path))
    # The restored net namespace is empty, so there is nothing to lock; CRIU would run iptables for that.
    options.empty_ns = linux.CLONE_NEWNET
    options.network_lock = pycriu.rpc.SKIP
    options.ghost_limit = GHOST_LIMIT
    options.manage_cgroups_mode = pycriu.rpc.IGNORE
    options.log_level = LOG_LEVEL
    return options


def _run(
    worker: Worker, pycriu: Any, verb: str, options: Any, images: Path, work: Path, timeout: float
) -> Any:
    log = work / f"{verb}.log"
    images_fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    work_fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        options.images_dir_fd = images_fd
        options.work_dir_fd = work_fd
        options.log_file = log.name
        client = pycriu.criu()
        client.opts = options
        client.use_fd(worker.connection.fileno())
        # Set as an option of the socket, because pycriu reads through a duplicate of the descriptor.
        deadline = struct.pack("ll", int(timeout), int(timeout % 1 * 1_000_000))
        worker.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, deadline)
        return getattr(client, verb)()
    except pycriu.CRIUExceptionExternal as error:
        raise CriuFailed(f"criu {verb} failed: {last_words(log) or error}") from error
    except (pycriu.CRIUExceptionInternal, ConnectionError) as error:
        if (status := _ended(worker.process)) is not None:
            raise CriuLost(
                f"criu {verb} ended without an answer (status {status}): {last_words(log) or error}"
            ) from error
        raise CriuTimeout(
            f"criu {verb} gave no answer within {timeout:.0f} s: {last_words(log) or error}"
        ) from error
    finally:
        os.close(images_fd)
        os.close(work_fd)
        worker.close()


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """Its status, if it has ended: the end of its connection shows a moment before."""
    try:
        return process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def last_words(log: Path) -> str:
    """The first errors in a CRIU log, shortened."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line.partition("Error ")[2].strip() for line in lines if "Error" in line]
    return "; ".join(errors[:3])[:600]

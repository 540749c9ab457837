"""A service's state directory: private to its user, and used by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dumont.errors import FailedPrecondition


def make_private(directory: Path) -> None:
    """Create the directory if it does not exist, and make it accessible to its owner only.

    Raises:
        FailedPrecondition: STATE_UNUSABLE.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
    except OSError as error:
        raise FailedPrecondition(
            "STATE_UNUSABLE",
            f"the state directory {directory} cannot be used: {error.strerror or error}; "
            "choose another --state-dir, or make it writable",
            metadata={"directory": str(directory)},
        ) from error


@contextlib.contextmanager
def locked(path: Path, service: str, address: str) -> Iterator[None]:
    """Hold the lock file at ``path`` until the context ends; the kernel releases it if the process dies.

    Args:
        path: of the lock file, which remains and names its last holder.
        service: the holder's name, for the message to a second process.
        address: where that service listens.

    Raises:
        FailedPrecondition: STATE_IN_USE, another process holds it; the message says which one.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FailedPrecondition(
            "STATE_UNUSABLE",
            f"{path} cannot be opened: {error.strerror or error}",
            metadata={"path": str(path)},
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path, lock) from None
        holder = {"service": service, "pid": os.getpid(), "address": address, "since": int(time.time())}
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(lock)


def _in_use(path: Path, lock: int) -> FailedPrecondition:
    who, pid = "another process", ""
    # The holder writes who it is just after it has the lock, so there may be nothing to read yet.
    with contextlib.suppress(ValueError, KeyError, TypeError):
        holder = json.loads(os.pread(lock, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder["since"]))
        pid = str(holder["pid"])
        who = f"{holder['service']} with process id {pid}, on {holder['address']} since {since},"
    return FailedPrecondition(
        "STATE_IN_USE",
        f"{who} holds {path}; stop it, or choose another state directory or database",
        metadata={"path": str(path), "pid": pid},
    )

"""The weight files that are registered with the driver, so that GPUs can read them directly."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotd.cuda.driver import DriverError, LoaderError, call


class StillRegistered(Exception):
    """The driver does not release a file, so only the end of this process frees its memory."""


@dataclass(eq=False)
class Registered:
    """A registered file, and the number of orders that read from it."""

    identity: tuple[int, int]
    mapping: mmap.mmap
    address: int
    users: int = 0

    @classmethod
    def open(cls, driver: Any, path: Path) -> Registered:
        """Map a file and register it.

        Raises:
            LoaderError: it is not among the node's weight files, or cannot be registered.
        """
        if path.is_symlink() or not path.is_file():
            raise LoaderError(f"{path.name} is not among the node's weight files")
        with path.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), 0)
            identity = identify(os.fstat(file.fileno()))
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        try:
            call(driver.cuMemHostRegister, address, len(mapping), driver.CU_MEMHOSTREGISTER_PORTABLE)
        except DriverError:
            mapping.close()
            raise
        return cls(identity, mapping, address)

    def close(self, driver: Any) -> None:
        """Unregister the file and unmap it.

        Raises:
            StillRegistered: the driver does not release it.
        """
        try:
            call(driver.cuMemHostUnregister, self.address)
        except DriverError as error:
            raise StillRegistered(str(error)) from error
        self.mapping.close()


def identify(status: os.stat_result) -> tuple[int, int]:
    """The inode and size of a file."""
    return status.st_ino, status.st_size


class Files:
    """The registered files of one directory, by name.

    Each method must be called by a thread with a current context of some GPU. After ``StillRegistered`` the
    process must end.

    Args:
        directory: the node's weight cache.
        driver: the CUDA driver's bindings.
    """

    def __init__(self, directory: Path, driver: Any) -> None:
        self.directory = directory
        self._driver = driver
        self._open: dict[str, Registered] = {}
        # Names of files that a thread is registering. 15 GB take 0.4 s, for which other files do not wait.
        self._opening: set[str] = set()
        # Evicted files that orders still read from.
        self._leaving: set[Registered] = set()
        self._changed = threading.Condition()

    @contextmanager
    def use(self, paths: Iterable[str]) -> Iterator[Mapping[str, Registered]]:
        """Register files, unless they are, and keep them registered until the context ends.

        Args:
            paths: paths as a model host sees them, of which only the file names count.

        Raises:
            LoaderError: one is not among the node's weight files, or cannot be registered.
            StillRegistered: an evicted file cannot be released.
        """
        used: dict[str, Registered] = {}
        try:
            for path in paths:
                if path not in used:
                    used[path] = self._take(Path(path).name)
            yield used
        finally:
            with self._changed:
                for registered in used.values():
                    registered.users -= 1
                self._close_unused()

    def register(self, name: str) -> None:
        """Register a file before its first use; raises as :meth:`use` does."""
        with self.use([name]):
            pass

    def forget(self) -> None:
        """Release files that have left the directory. Their memory is free when this returns.

        Raises:
            StillRegistered: the driver does not release one.
        """
        with self._changed:
            self._forget_gone()
            self._changed.wait_for(lambda: not self._leaving and all(map(self._there, self._opening)))

    def _take(self, name: str) -> Registered:
        """A registered file, with one more user."""
        with self._changed:
            self._forget_gone()
            self._changed.wait_for(lambda: name not in self._opening)
            if (registered := self._open.get(name)) is not None:
                registered.users += 1
                return registered
            self._opening.add(name)
        registered = None
        try:
            registered = Registered.open(self._driver, self.directory / name)
            registered.users = 1
            return registered
        finally:
            with self._changed:
                self._opening.remove(name)
                if registered is not None:
                    self._open[name] = registered
                    # It may have been evicted meanwhile.
                    self._forget_gone()
                self._changed.notify_all()

    def _forget_gone(self) -> None:
        for name, registered in list(self._open.items()):
            if not self._there(name, registered):
                del self._open[name]
                self._leaving.add(registered)
        self._close_unused()

    def _close_unused(self) -> None:
        for registered in [file for file in self._leaving if not file.users]:
            registered.close(self._driver)
            self._leaving.remove(registered)
        self._changed.notify_all()

    def _there(self, name: str, registered: Registered | None = None) -> bool:
        try:
            found = identify((self.directory / name).stat())
        except FileNotFoundError:
            return False
        return registered is None or found == registered.identity

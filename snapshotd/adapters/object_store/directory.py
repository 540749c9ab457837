"""The ObjectStore port over a directory that nodes may share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from dumont.aio import thread_to_completion
from dumont.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from snapshotd.repository.model import ObjectInfo
from snapshotd.repository.object_keys import TEMPORARY
from snapshotd.repository.ports import BytesLike, Run
from snapshotd.system.files import sync

T = TypeVar("T")

ATTEMPTS = 10

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class DirectoryObjects:
    """The objects of a directory, as files. Each is written under a temporary name and then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # A writer that is cancelled waits for its thread, or its file could appear in a directory that its
    # caller has meanwhile removed.

    async def put(self, key: str, data: bytes) -> None:
        await thread_to_completion(partial(_guarded, self._put, key, data))

    async def create(self, key: str, data: bytes) -> None:
        await thread_to_completion(partial(_guarded, self._create, key, data))

    async def get(self, key: str, limit: int) -> bytes:
        return await self._run(self._get, key, limit)

    async def read(self, key: str, limit: int, use: Callable[[BytesLike], T], run: Run) -> T:
        return await run(lambda: use(_guarded(self._get, key, limit)))

    async def stat(self, key: str) -> ObjectInfo | None:
        return await self._run(self._stat, key)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        for item in await self._run(lambda: list(self._walk(prefix))):
            yield item

    async def delete(self, key: str) -> None:
        await self._run(self._delete, key)

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.to_thread(_guarded, work, *args)

    def _put(self, key: str, data: bytes) -> None:
        with self._written(key, data) as (scratch, path):
            _move(scratch.replace, path)

    def _create(self, key: str, data: bytes) -> None:
        with self._written(key, data) as (scratch, path):
            try:
                # A hard link, unlike a rename, never replaces an existing file.
                _move(lambda path: path.hardlink_to(scratch), path)
            except FileExistsError:
                raise AlreadyExists("OBJECT_EXISTS", f"{key} exists", metadata={"key": key}) from None

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """Write bytes durably under a temporary name. The directory is made durable when the context ends."""
        path = self._path(key)
        scratch = self.root / TEMPORARY / f"{os.getpid()}-{os.urandom(8).hex()}"
        scratch.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            yield scratch, path
            with contextlib.suppress(FileNotFoundError):  # deleted again by another node
                sync(path.parent)
        finally:
            scratch.unlink(missing_ok=True)

    def _get(self, key: str, limit: int) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                data = file.read(limit + 1)
        except FileNotFoundError:
            raise NotFound("OBJECT_NOT_FOUND", f"there is no {key}", metadata={"key": key}) from None
        if len(data) > limit:
            raise DataLoss(
                "OBJECT_TOO_LARGE",
                f"{key} has more than the {limit} bytes it may have",
                metadata={"key": key},
            )
        return data

    def _stat(self, key: str) -> ObjectInfo | None:
        return self._info(self._path(key))

    def _info(self, path: Path) -> ObjectInfo | None:
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        key = path.relative_to(self.root).as_posix()
        return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        start = self.root / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(start):
            for name in names:
                info = self._info(Path(folder, name))
                if info is not None and info.key.startswith(prefix):
                    yield info

    def _delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        for folder in path.parents:
            # Those of all snapshots and all chunks stay: they are nobody's own.
            if folder.parent == self.root or folder == self.root or not _remove_empty(folder):
                break

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InvalidArgument("INVALID_KEY", f"{key[:120]!r} is no key", metadata={"key": key[:120]})
        return self.root / key


def _move(move: Callable[[Path], object], path: Path) -> None:
    """Have ``move`` make ``path``, in a directory that another node may remove as an empty one meanwhile."""
    for attempt in range(ATTEMPTS):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            move(path)
        except FileNotFoundError:
            if attempt == ATTEMPTS - 1:
                raise
        else:
            return


def _remove_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # there is something in it, or it is gone
        return False
    return True


def _guarded(work: Callable[..., T], *args: object) -> T:
    try:
        return work(*args)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted("STORE_FULL", "the store's disk is full") from error
        raise Unavailable("STORE_UNAVAILABLE", f"the store's directory failed: {error.strerror}") from error

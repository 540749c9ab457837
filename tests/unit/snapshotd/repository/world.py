"""A store without a server: objects in memory, a clock that tests move, nodes with keys, and images."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dumont.errors import AlreadyExists, DataLoss, NotFound
from snapshotd.failpoints import Failpoints
from snapshotd.model import ImageFile, Manifest
from snapshotd.repository.model import CHUNK, ObjectInfo, PublishedSnapshot
from snapshotd.repository.ports import BytesLike, KeyWrapper, ObjectStore, Run
from snapshotd.repository.repository import Repository
from snapshotd.repository.signing import Signer, TrustedKeys
from tests.unit.snapshotd.test_manifest import a_manifest

T = TypeVar("T")

GRACE = timedelta(hours=4)


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.time = datetime(2026, 11, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def advance(self, time: timedelta) -> None:
        self.time += time


class WallClock(Clock):
    """The machine's own time."""

    def __call__(self) -> datetime:
        return datetime.now(UTC)


class MemoryObjects:
    """The ObjectStore port over a dictionary.

    Attributes:
        calls: every call as (method, key), in order.
        before: called before each call with the same; it may raise, or change the store.
        in_flight, most_in_flight: calls at once, now and at most.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.objects: dict[str, tuple[bytes, datetime]] = {}
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda method, key: None
        self.in_flight = self.most_in_flight = 0

    async def put(self, key: str, data: bytes) -> None:
        await self._called("put", key)
        self.objects[key] = (bytes(data), self.clock())

    async def create(self, key: str, data: bytes) -> None:
        await self._called("create", key)
        if key in self.objects:
            raise AlreadyExists("OBJECT_EXISTS", f"{key} exists")
        self.objects[key] = (bytes(data), self.clock())

    async def get(self, key: str, limit: int) -> bytes:
        await self._called("get", key)
        if key not in self.objects:
            raise NotFound("OBJECT_NOT_FOUND", f"there is no {key}")
        data = self.objects[key][0]
        if len(data) > limit:
            raise DataLoss("OBJECT_TOO_LARGE", f"{key} is too large")
        return data

    async def read(self, key: str, limit: int, use: Callable[[BytesLike], T], run: Run) -> T:
        stored = await self.get(key, limit)
        return await run(lambda: use(stored))

    async def stat(self, key: str) -> ObjectInfo | None:
        await self._called("stat", key)
        return self._info(key) if key in self.objects else None

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        await self._called("list", prefix)
        for key in [key for key in self.objects if key.startswith(prefix)]:
            if key in self.objects:
                yield self._info(key)

    async def delete(self, key: str) -> None:
        await self._called("delete", key)
        self.objects.pop(key, None)

    def keys(self, prefix: str = "") -> set[str]:
        return {key for key in self.objects if key.startswith(prefix)}

    def sent(self) -> Sequence[str]:
        """The chunks that were put, in order, since the calls were last cleared."""
        return [key for method, key in self.calls if method == "put" and key.startswith("chunks/")]

    def change(self, key: str, change: Callable[[bytes], bytes]) -> None:
        """What the bucket's owner can do to an object."""
        data, modified = self.objects[key]
        self.objects[key] = (change(data), modified)

    def _info(self, key: str) -> ObjectInfo:
        data, modified = self.objects[key]
        return ObjectInfo(key, len(data), modified)

    async def _called(self, method: str, key: str) -> None:
        self.calls.append((method, key))
        self.before(method, key)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        # Others run here, as they would while a request is under way.
        await asyncio.sleep(0)
        self.in_flight -= 1


def in_a_thread(work: Callable[[], T]) -> Awaitable[T]:
    """Some thread, for those who read."""
    return asyncio.to_thread(work)


def a_signer() -> Signer:
    return Signer(Ed25519PrivateKey.generate())


def a_node(
    objects: ObjectStore,
    signer: Signer | None = None,
    *,
    trusts: tuple[Signer, ...] = (),
    wrapper: KeyWrapper | None = None,
    clock: Clock | None = None,
    failpoints: Failpoints | Mapping[str, str] | None = None,
    workers: int = 4,
    grace: timedelta = GRACE,
) -> Repository:
    """A node's view of the store; it trusts itself and those named."""
    signer = signer or a_signer()
    return Repository(
        objects,
        signer,
        TrustedKeys([key.public for key in (signer, *trusts)]),
        wrapper,
        workers=workers,
        threads=1,
        grace=grace,
        now=clock or getattr(objects, "clock", None) or Clock(),
        failpoints=failpoints if isinstance(failpoints, Failpoints) else Failpoints(failpoints),
    )


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


CONTENT = {
    "inventory.img": b"i" * 100,
    # A chunk, a hole of two, the first chunk again, and a last one that is short.
    "pages-1.img": noise(CHUNK, 1) + bytes(2 * CHUNK) + noise(CHUNK, 1) + noise(70_000, 2),
    "empty.img": b"",
}


def an_image(folder: Path, snapshot: str = "s1", content: Mapping[str, bytes] | None = None) -> Manifest:
    """Write image files and return the manifest that describes them."""
    folder.mkdir(parents=True)
    content = CONTENT if content is None else content
    for name, data in content.items():
        (folder / name).write_bytes(data)
    files = [ImageFile(name, len(data), blake3(data).hexdigest()) for name, data in sorted(content.items())]
    return a_manifest(id=snapshot, files=tuple(files))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def a_key_file(path: Path) -> Path:
    path.touch(mode=0o600)
    path.write_text(os.urandom(32).hex())
    return path


async def published(
    store: Repository, folder: Path, snapshot: str = "s1", content: dict[str, bytes] | None = None
) -> PublishedSnapshot:
    return await store.publish(
        an_image(folder / f"images-{snapshot}", snapshot, content), folder / f"images-{snapshot}"
    )


async def fetched(store: Repository, snapshot: PublishedSnapshot, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    await store.fetch(snapshot, folder)
    return contents(folder)

"""The WeightFiles port. Each file is read once, both for its digest and for its copy in the weight cache."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog
from blake3 import blake3
from prometheus_client import Counter

from snapshotd.model import MappedFile, Model
from snapshotd.system.hashing import update_from
from snapshotd.system.threads import PatientThreads
from snapshotd.weights.cache import WeightCache, occupied
from snapshotd.weights.known import KnownDigests, identify

log = structlog.get_logger(__name__)

USES = Counter(
    "dumont_weight_cache_uses_total",
    "Instances that asked for weights in memory: they were there, were filled, or did not fit.",
    ("outcome",),
)


# A file of 100 GB at the speed of a slow disk.
HASH_SECONDS = 3600.0


@dataclass
class _Fill:
    """A file that is being copied into the cache, and the instances that it will be pinned for."""

    task: asyncio.Task[str]
    owners: set[str] = field(default_factory=set)


class NodeWeightFiles:
    """The weight files of this node's models.

    Args:
        digests: the file that keeps digests.
        cache: None if instances map the files in the model's directory.
    """

    def __init__(self, digests: Path, cache: WeightCache | None) -> None:
        self.cache = cache
        self._known = KnownDigests(digests)
        self._threads = PatientThreads("reading the model's weights")
        # By the identity of the file that is read. They run to their end, because a thread cannot be stopped.
        self._fills: dict[str, _Fill] = {}
        self._hashes: dict[str, asyncio.Task[str]] = {}

    def cached_bytes(self) -> int:
        """Bytes that the weight cache holds; 0 if there is none."""
        return self.cache.used() if self.cache else 0

    async def mapped(self, model: Model) -> tuple[MappedFile, ...]:
        """See :meth:`WeightFiles.mapped`."""
        return await self._threads.run(
            lambda: tuple(map(_mapped, model.weights)), subject=_place(model.weights)
        )

    async def overwritten(self, files: Sequence[MappedFile]) -> str:
        """See :meth:`WeightFiles.overwritten`."""
        return await self._threads.run(
            lambda: next((file.path for file in files if _overwritten(file)), ""),
            subject=_place([Path(file.path) for file in files]),
        )

    async def digest(self, model: Model) -> str:
        """See :meth:`WeightFiles.digest`."""
        hasher = blake3()
        for path in model.weights:
            hasher.update(f"{path.name} {await self._digest(path)}\n".encode())
        return hasher.hexdigest()

    async def pin(self, instance: str, model: Model) -> Mapping[str, str]:
        """See :meth:`WeightFiles.pin`."""
        if self.cache is None:
            return {}
        # A mount that hangs blocks one of these threads here, and not the event loop below.
        await self._threads.run(partial(_identify_all, model.weights), subject=_place(model.weights))
        try:
            pinned = {path: self._pin(self.cache, instance, path) for path in model.weights}
            missing = [path for path, digest in pinned.items() if digest is None]
            outcome = "filled" if missing else "hit"
            if missing:
                pinned |= await self._fill(self.cache, instance, missing)
            files = {path.name: digest for path, digest in pinned.items() if digest is not None}
            if len(files) < len(model.weights):
                outcome, files = "bypassed", {}
                self.unpin(instance)
                log.warning(
                    "weights_do_not_fit_cache",
                    model=model.name,
                    bytes=model.weights_bytes,
                    budget=self.cache.budget,
                )
            USES.labels(outcome).inc()
            return files
        except BaseException:
            self.unpin(instance)
            raise

    def repin(self, instance: str, files: Mapping[str, str]) -> None:
        """See :meth:`WeightFiles.repin`."""
        if self.cache is not None:
            for digest in files.values():
                self.cache.pin(instance, digest)

    def unpin(self, instance: str) -> None:
        """See :meth:`WeightFiles.unpin`."""
        for fill in self._fills.values():
            fill.owners.discard(instance)
        if self.cache is not None:
            self.cache.unpin(instance)

    async def close(self) -> None:
        """Wait for files that are being read, and close the cache."""
        if reading := [*self._hashes.values(), *(fill.task for fill in self._fills.values())]:
            await asyncio.wait(reading)
        if self.cache is not None:
            self.cache.close()

    def _pin(self, cache: WeightCache, instance: str, path: Path) -> str | None:
        digest = self._known.get(identify(path))
        return digest if digest is not None and cache.pin(instance, digest) else None

    async def _fill(
        self, cache: WeightCache, instance: str, paths: Sequence[Path]
    ) -> Mapping[Path, str | None]:
        """Copy files into the cache for an instance, and wait for those that another start is copying.

        Returns:
            The digest of each file; None if there was no space for it.
        """
        identities = {path: identify(path) for path in paths}
        # Several names may refer to one file, as the links of the hub's cache do. It is copied once.
        new = {identity: path for path, identity in identities.items() if identity not in self._fills}
        sizes = {identity: occupied(path.stat().st_size) for identity, path in new.items()}
        if not cache.reserve(sum(sizes.values())):
            # They may be in the cache without being recognized, if the model's directory is a copy of
            # another.
            for path in paths:
                await self._digest(path)
            return {path: self._pin(cache, instance, path) for path in paths}
        for identity, path in new.items():
            self._begin(cache, path, identity, sizes[identity])
        fills = {path: self._fills[identity] for path, identity in identities.items()}
        for fill in fills.values():
            fill.owners.add(instance)
        # Wait for all of them even if one fails, because the others still take space.
        await asyncio.wait([fill.task for fill in fills.values()])
        try:
            return {path: fill.task.result() for path, fill in fills.items()}
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            log.warning("weight_cache_exceeds_memory", error=str(error))
            return dict.fromkeys(paths)

    def _begin(self, cache: WeightCache, path: Path, identity: str, size: int) -> None:
        owners: set[str] = set()

        async def work() -> str:
            try:
                digest = await cache.fill(path, size, owners)
                self._known.remember(identity, digest)
                return digest
            finally:
                del self._fills[identity]

        task = asyncio.create_task(work(), name=f"fill {path.name}")
        task.add_done_callback(_hear)
        self._fills[identity] = _Fill(task, owners)

    async def _digest(self, path: Path) -> str:
        identity = await self._threads.run(partial(identify, path), subject=_place([path]))
        if (known := self._known.get(identity)) is not None:
            return known
        if (fill := self._fills.get(identity)) is not None:
            return await asyncio.shield(fill.task)
        if identity not in self._hashes:
            self._hashes[identity] = asyncio.create_task(self._hash(path, identity), name=f"hash {path.name}")
            self._hashes[identity].add_done_callback(_hear)
        return await asyncio.shield(self._hashes[identity])

    async def _hash(self, path: Path, identity: str) -> str:
        try:
            hasher = blake3(max_threads=blake3.AUTO)
            await self._threads.run(partial(update_from, hasher, path), HASH_SECONDS, subject=_place([path]))
            self._known.remember(identity, hasher.hexdigest())
            return str(hasher.hexdigest())
        finally:
            del self._hashes[identity]


def _mapped(path: Path) -> MappedFile:
    status = path.stat()
    return MappedFile(str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _overwritten(file: MappedFile) -> bool:
    try:
        now = _mapped(Path(file.path))
    except FileNotFoundError:  # what is mapped of it stays
        return False
    same = (now.device, now.inode) == (file.device, file.inode)
    return same and (now.size, now.modified_ns) != (file.size, file.modified_ns)


def _identify_all(paths: Sequence[Path]) -> None:
    for path in paths:
        identify(path)


def _hear(task: asyncio.Task[str]) -> None:
    """Log the error of a task for which nobody may wait any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("weights_unreadable", file=task.get_name(), error=str(error))


def _place(files: Sequence[Path]) -> str:
    """The directory that hangs if these files of one model do."""
    return str(files[0].parent) if files else ""

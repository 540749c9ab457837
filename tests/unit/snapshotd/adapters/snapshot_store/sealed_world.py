"""A node whose snapshots are encrypted: its disk, its memory (here a directory as well) and its key."""

from __future__ import annotations

from pathlib import Path

from snapshotd.adapters.object_store.key_file import KeyFile
from snapshotd.adapters.snapshot_store.directory import DirectoryStore
from snapshotd.adapters.snapshot_store.sealed import SealedStore
from snapshotd.failpoints import Failpoints
from snapshotd.model import Snapshot
from tests.unit.snapshotd.repository.world import a_key_file, a_signer, noise
from tests.unit.snapshotd.test_manifest import a_manifest

MARKER = b"a prompt that nobody may read"
CONTENT = {
    "inventory.img": b"i" * 100 + MARKER,
    "pages-1.img": noise(9_000_000, 1) + MARKER,
    "core-1.img": noise(70_000, 2),
}


class SealedNode:
    """What outlives a daemon of it."""

    def __init__(self, root: Path) -> None:
        self.disk = root / "disk"
        self.memory = root / "memory"
        self.key = a_key_file(root / "key")
        self.signer = a_signer()

    def open(self, failpoints: Failpoints | None = None, **kept: str) -> SealedStore:
        """The store as a daemon opens it.

        Args:
            kept: what instances of an earlier daemon map, by instance.
        """
        store = SealedStore(
            self.disk,
            DirectoryStore(self.memory, threads=1),
            self.signer,
            KeyFile(self.key),
            threads=1,
            failpoints=failpoints,
        )
        for instance, snapshot in kept.items():
            store.pin(instance, snapshot)
        store.open()
        return store

    def plain(self) -> list[str]:
        """The snapshots whose image files are in memory."""
        return sorted(path.name for path in self.memory.iterdir())

    def sealed(self, snapshot: str = "s1") -> list[Path]:
        """The chunks of one, by name."""
        return sorted((self.disk / snapshot / "chunks").rglob("*/*/*"))


async def capture(store: SealedStore, snapshot: str = "s1", fetched_from: str = "") -> Snapshot:
    folder = await store.stage(snapshot)
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    files = tuple(await store.digest(snapshot))
    return await store.commit(a_manifest(id=snapshot, files=files), fetched_from)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.img")}

"""A process that walks through all of a store's life and dies where its failpoint says.

``python -m tests.contracts.store_process STORE KEY IMAGES INTO FAILPOINT``
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from snapshotd.adapters.object_store.directory import DirectoryObjects
from snapshotd.adapters.object_store.s3 import S3Objects, S3Settings
from snapshotd.failpoints import Failpoints
from snapshotd.manifest import decode
from snapshotd.repository.ports import ObjectStore
from snapshotd.repository.repository import Repository
from snapshotd.repository.signing import Signer, TrustedKeys

# The points that the life below passes, in its order.
POINTS = (
    "upload.chunk",
    "upload.chunk.after",
    "upload.manifest",
    "upload.manifest.after",
    "fetch.chunk",
    "fetch.chunk.after",
    "delete.tombstone",
    "delete.manifest",
    "delete.manifest.after",
    "prune.chunk",
    "prune.chunk.after",
    "prune.tombstone",
    "prune.tombstone.after",
)


def open_objects(location: str) -> ObjectStore:
    """A directory, or the JSON of S3's settings."""
    return (
        S3Objects(S3Settings(**json.loads(location)))
        if location.startswith("{")
        else DirectoryObjects(Path(location))
    )


def open_store(location: str, key: Path, failpoints: str = "") -> Repository:
    signer = Signer.open(key)
    return Repository(
        open_objects(location),
        signer,
        TrustedKeys([signer.public]),
        workers=2,
        threads=1,
        grace=timedelta(0),
        failpoints=Failpoints.parse(failpoints),
    )


async def collect(store: Repository) -> None:
    """Collect whatever is garbage; a bucket's clock counts whole seconds and may be ahead."""
    await store.prune(await store.plan_prune(datetime.now(UTC) + timedelta(seconds=5)))


async def live(store: Repository, images: Path, into: Path) -> None:
    """Publish ``new``, fetch it, delete ``old``, collect."""
    manifest = decode((images / "manifest.json").read_bytes())
    await store.fetch(await store.publish(manifest, images), into)
    await store.delete("old")
    await collect(store)


if __name__ == "__main__":
    location, key, images, into, failpoint = sys.argv[1:]
    asyncio.run(live(open_store(location, Path(key), f"{failpoint}=exit"), Path(images), Path(into)))

"""Open the object store that the settings name. Run as a program, this checks or measures the store."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from pydantic import ValidationError

from dumont.errors import DumontError, FailedPrecondition, InvalidArgument
from snapshotd.adapters.object_store.directory import DirectoryObjects
from snapshotd.adapters.object_store.key_file import KeyFile
from snapshotd.adapters.object_store.s3 import S3Objects, S3Settings
from snapshotd.adapters.object_store.trusted_keys import TrustedKeysFile
from snapshotd.config import Settings
from snapshotd.failpoints import Failpoints
from snapshotd.repository import document
from snapshotd.repository.codec import OVERHEAD
from snapshotd.repository.model import CHUNK
from snapshotd.repository.object_keys import TEMPORARY, chunk_key, manifest_key
from snapshotd.repository.ports import ObjectStore
from snapshotd.repository.repository import Repository, check_conditional_create
from snapshotd.repository.signing import Signer, TrustedKeys
from snapshotd.repository.workers import Limits, Workers

SIGNING_KEY = "signing.key"
# The line that other nodes need among their trusted keys to restore snapshots that this node has captured.
PUBLIC_KEY = "signing.pub"
PASSES = 3


def open_objects(settings: Settings) -> ObjectStore | None:
    """The bucket or directory of ``store_url``; None if that is empty. Nothing is sent yet.

    Raises:
        InvalidArgument: INVALID_STORE_URL or INVALID_ENDPOINT.
        FailedPrecondition: STORE_CREDENTIALS_MISSING.
    """
    url = settings.store_url
    if not url:
        return None
    if url.startswith("file://"):
        path = Path(url.removeprefix("file://"))
        if not path.is_absolute():
            raise InvalidArgument("INVALID_STORE_URL", f"a directory must be file:///PATH; got {url!r}")
        return DirectoryObjects(path)
    secret = settings.s3_secret_key.get_secret_value()
    if not settings.s3_access_key or not secret:
        raise FailedPrecondition(
            "STORE_CREDENTIALS_MISSING", "a bucket needs S3_ACCESS_KEY and S3_SECRET_KEY in the environment"
        )
    return S3Objects(
        S3Settings.from_url(
            url, settings.s3_endpoint, settings.s3_access_key, secret, settings.s3_region, settings.s3_ca_file
        ),
        Limits.of(settings.threads).calls,
    )


def open_repository(settings: Settings, failpoints: Failpoints) -> Repository | None:
    """The repository in the configured object store; None if no store is configured.

    Raises:
        InvalidArgument, FailedPrecondition: a setting or a key file is wrong.
    """
    objects = open_objects(settings)
    if objects is None:
        return None
    signer = Signer.open(settings.state_dir / SIGNING_KEY)
    (settings.state_dir / PUBLIC_KEY).write_text(f"{signer.line()}\n")
    keys = settings.trusted_keys_file
    limits = Limits.of(settings.threads)
    return Repository(
        objects,
        signer,
        TrustedKeysFile(keys, signer) if keys else TrustedKeys([signer.public]),
        KeyFile(settings.encryption_key_file) if settings.encryption_key_file else None,
        workers=limits.chunks,
        threads=limits.threads,
        grace=timedelta(seconds=settings.store_grace_seconds),
        failpoints=failpoints,
    )


async def check(settings: Settings) -> list[dict[str, object]]:
    """Check whether the configured store can be used, and return a list of one finding."""
    try:
        objects = open_objects(settings)
        if objects is None:
            return _finding(True, "none is configured; snapshots stay on their nodes")
        await check_conditional_create(objects)
    except DumontError as error:
        return _finding(False, f"{settings.store_url}: {error.message} ({error.reason})")
    return _finding(True, f"{settings.store_url}: only one of two writers wins, as it must")


def _finding(passed: bool, message: str) -> list[dict[str, object]]:
    return [{"check": "object_store", "passed": passed, "message": message}]


async def measure(settings: Settings, snapshot: str) -> dict[str, float]:
    """Measure the speed of the store itself, in megabytes a second, with as many calls as snapshots make.

    This reads the objects that a fetch of ``snapshot`` reads, and writes as many of the same sizes. Each is
    done three times, and the fastest one counts, with connections that are open already.
    """
    objects = open_objects(settings)
    if objects is None:
        raise FailedPrecondition("OBJECT_STORE_NOT_CONFIGURED", "set DUMONT_SNAPSHOTD_STORE_URL")
    chunks = document.named_chunks(await objects.get(manifest_key(snapshot), document.LARGEST))
    name = f"{TEMPORARY}speed-{os.urandom(8).hex()}"
    noise = os.urandom(CHUNK + OVERHEAD)
    workers = Workers(Limits.of(settings.threads).chunks, 1)
    sizes: dict[str, int] = {}

    async def read(chunk: str) -> None:
        sizes[chunk] = await objects.read(chunk_key(chunk), CHUNK + OVERHEAD, len, workers.wait)

    async def write(chunk: str) -> None:
        await objects.put(f"{name}-{chunk}", noise[: sizes[chunk]])

    async def remove(chunk: str) -> None:
        await objects.delete(f"{name}-{chunk}")

    speeds: dict[str, float] = {}
    try:
        for _ in range(PASSES):
            for what, work in (("raw_read_mb_per_s", read), ("raw_write_mb_per_s", write)):
                before = time.monotonic()
                await workers.each(chunks, work)
                speed = sum(sizes.values()) / 1e6 / (time.monotonic() - before)
                speeds[what] = max(speed, speeds.get(what, 0.0))
    finally:
        await workers.each(chunks, remove)
        workers.close()
    return speeds


def main() -> None:
    """The command ``python -m snapshotd.object_store check`` or ``measure SNAPSHOT``, which prints JSON."""
    work: dict[str, Callable[[Settings], object]] = {
        "check": lambda settings: asyncio.run(check(settings)),
        "measure": lambda settings: asyncio.run(measure(settings, sys.argv[2])),
    }
    try:
        sys.stdout.write(json.dumps(work[sys.argv[1]](Settings.model_validate({}))) + "\n")
    except (DumontError, ValidationError) as error:
        raise SystemExit(f"snapshotd.object_store: {error}") from None


if __name__ == "__main__":
    main()

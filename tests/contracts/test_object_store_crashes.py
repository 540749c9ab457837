"""Killed at any named point, a store lists only what is whole, and the next one finishes the work."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from dumont.names import new_id
from snapshotd import manifest as manifests
from snapshotd.repository.model import CHUNK
from snapshotd.repository.object_keys import chunk_key, manifest_key
from tests.contracts.store_process import POINTS, collect, open_store
from tests.helpers.s3_server import S3Server
from tests.unit.snapshotd.repository.world import an_image, contents, noise

KILLED = 70
ROOT = Path(__file__).parents[2]
OLD = {"pages-1.img": noise(CHUNK, 1) + noise(1000, 2)}
NEW = {"pages-1.img": noise(CHUNK, 1) + noise(1000, 3), "pages-2.img": noise(1000, 4)}


@pytest.fixture(params=["directory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "directory":
        return str(tmp_path / "objects")
    server: S3Server = request.getfixturevalue("s3_server")
    settings = {"bucket": server.bucket, "prefix": new_id("crash"), "endpoint": server.endpoint}
    return json.dumps(settings | {"access_key": server.access_key, "secret_key": server.secret_key})


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at(point: str, location: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    store = open_store(location, key)
    await store.publish(an_image(tmp_path / "old", "old", OLD), tmp_path / "old")
    manifest = an_image(tmp_path / "new", "new", NEW)
    (tmp_path / "new" / "manifest.json").write_bytes(manifests.encode(manifest))
    (tmp_path / "into").mkdir()

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.contracts.store_process"),
        *(location, str(key), str(tmp_path / "new"), str(tmp_path / "into"), point),
        cwd=ROOT,
    )
    assert await process.wait() == KILLED

    # Whatever is listed can be fetched, and reads as it was.
    after = open_store(location, key)
    for found in await after.list():
        into = tmp_path / f"after-{found.manifest.id}"
        into.mkdir()
        await after.fetch(found, into)
        assert contents(into) == (OLD if found.manifest.id == "old" else NEW)
    # The upload is taken up again, and nothing is left of it or of what died besides the snapshots.
    await after.publish(manifest, tmp_path / "new")
    await collect(after)
    listed = await after.list()
    assert "new" in {found.manifest.id for found in listed}
    needed = {manifest_key(found.manifest.id) for found in listed}
    needed |= {chunk_key(chunk) for found in listed for chunk in found.chunks()}
    assert {item.key async for item in after.objects.list("")} == needed

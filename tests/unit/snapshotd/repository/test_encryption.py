"""With a key file nothing readable leaves the node."""

from __future__ import annotations

from pathlib import Path

import pytest

from dumont.errors import DataLoss, FailedPrecondition
from snapshotd.adapters.object_store.key_file import KeyFile
from snapshotd.repository.model import CHUNK
from tests.unit.snapshotd.repository.world import (
    MemoryObjects,
    a_key_file,
    a_node,
    a_signer,
    an_image,
    fetched,
    noise,
    published,
)

MARKER = b"the quick brown marker 4711"


@pytest.fixture
def key_file(tmp_path: Path) -> KeyFile:
    return KeyFile(a_key_file(tmp_path / "key"))


def content() -> dict[str, bytes]:
    return {"pages-1.img": MARKER * 1000 + noise(CHUNK, 3), "pages-2.img": MARKER}


async def test_a_marker_is_found_nowhere_and_comes_back(tmp_path: Path, key_file: KeyFile) -> None:
    objects = MemoryObjects()
    store = a_node(objects, wrapper=key_file)
    snapshot = await published(store, tmp_path, content=content())
    assert snapshot.encrypted
    assert objects.keys("chunks/")
    assert not any(MARKER in data or MARKER[:8] in data for data, _ in objects.objects.values())
    assert await fetched(store, snapshot, tmp_path / "into") == content()


async def test_chunk_names_do_not_tell_what_they_hold(tmp_path: Path, key_file: KeyFile) -> None:
    plain, sealed = MemoryObjects(), MemoryObjects()
    await published(a_node(plain), tmp_path / "plain", content=content())
    store = a_node(sealed, wrapper=key_file)
    await published(store, tmp_path / "sealed", content=content())
    await published(store, tmp_path / "sealed", "s2", content=content())
    assert not plain.keys("chunks/") & sealed.keys("chunks/")
    assert len(sealed.keys("chunks/")) == 2 * len(plain.keys("chunks/"))


@pytest.mark.parametrize("other_key", [False, True])
async def test_without_the_key_it_is_refused_before_a_byte_is_read(
    tmp_path: Path, key_file: KeyFile, other_key: bool
) -> None:
    objects, signer = MemoryObjects(), a_signer()
    await published(a_node(objects, signer, wrapper=key_file), tmp_path, content=content())
    wrapper = KeyFile(a_key_file(tmp_path / "other")) if other_key else None
    store = a_node(objects, trusts=(signer,), wrapper=wrapper)
    snapshot = await store.get("s1")
    objects.calls.clear()
    with pytest.raises(FailedPrecondition) as refusal:
        await fetched(store, snapshot, tmp_path / "into")
    assert refusal.value.reason == "KEY_MISSING"
    assert objects.calls == []


async def test_a_resumed_upload_with_its_key_sends_nothing_twice(tmp_path: Path, key_file: KeyFile) -> None:
    objects, signer = MemoryObjects(), a_signer()
    manifest = an_image(tmp_path / "images", content=content())
    first = a_node(objects, signer, wrapper=key_file, failpoints={"upload.manifest": "error"})
    key = first.new_key("s1")
    with pytest.raises(Exception, match="failpoint"):
        await first.publish(manifest, tmp_path / "images", key=key)
    objects.calls.clear()
    second = a_node(objects, signer, wrapper=key_file)
    await second.publish(manifest, tmp_path / "images", key=key)
    assert objects.sent() == []


async def test_a_key_of_another_snapshot_does_not_open(tmp_path: Path, key_file: KeyFile) -> None:
    store = a_node(MemoryObjects(), wrapper=key_file)
    with pytest.raises(DataLoss) as refusal:
        await store.publish(an_image(tmp_path / "i"), tmp_path / "i", key=store.new_key("other"))
    assert refusal.value.reason == "KEY_DAMAGED"

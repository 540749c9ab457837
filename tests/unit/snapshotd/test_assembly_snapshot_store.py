"""Which store of its own a node opens, and when it refuses to start rather than leave something readable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import structlog

from dumont.errors import FailedPrecondition
from snapshotd.adapters.snapshot_store.directory import DirectoryStore
from snapshotd.assembly import open_snapshot_store
from snapshotd.config import Settings
from snapshotd.failpoints import Failpoints
from snapshotd.instances.journal import Journal
from snapshotd.ports import SnapshotStore
from tests.unit.snapshotd.repository.world import a_key_file
from tests.unit.snapshotd.test_manifest import a_manifest


def opened(state: Path, **settings: Any) -> SnapshotStore:
    read = Settings.model_validate({"state_dir": state, **settings})
    return open_snapshot_store(read, Failpoints(), Journal(state / "journal"))


async def captured(store: SnapshotStore, snapshot: str) -> None:
    (await store.stage(snapshot) / "pages-1.img").write_bytes(b"pages")
    await store.commit(a_manifest(id=snapshot, files=tuple(await store.digest(snapshot))))


def refusal(state: Path, **settings: Any) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as refused:
        opened(state, encrypt_local=True, **settings)
    return refused.value


def test_snapshots_are_plain_files_unless_encryption_is_asked_for(tmp_path: Path) -> None:
    key = a_key_file(tmp_path / "key")
    assert isinstance(opened(tmp_path, encryption_key_file=key), DirectoryStore)


def test_encryption_needs_a_key(tmp_path: Path) -> None:
    assert refusal(tmp_path).reason == "ENCRYPTION_KEY_MISSING"
    assert refusal(tmp_path, encryption_key_file=tmp_path / "none").reason == "KEY_FILE_UNUSABLE"


@pytest.mark.parametrize("where", ["snapshots", "elsewhere"])
async def test_plain_snapshots_are_named_and_stay_as_they_are(tmp_path: Path, where: str) -> None:
    directory = tmp_path / where
    cache = {} if where == "snapshots" else {"cache_dir": directory}
    plain = opened(tmp_path, **cache)
    for snapshot in ("s1", "s2"):
        await captured(plain, snapshot)

    refused = refusal(tmp_path, encryption_key_file=a_key_file(tmp_path / "key"), **cache)

    assert refused.reason == "PLAIN_SNAPSHOTS"
    assert "s1, s2" in refused.message
    assert [one.manifest.id for one in await opened(tmp_path, **cache).list()] == ["s1", "s2"]


def test_files_of_a_snapshot_that_lost_its_manifest_are_named_too(tmp_path: Path) -> None:
    lost = tmp_path / "snapshots/lost"
    lost.mkdir(parents=True)
    (lost / "pages-1.img").write_bytes(b"pages")
    refused = refusal(tmp_path, encryption_key_file=a_key_file(tmp_path / "key"))
    assert (refused.reason, refused.metadata["snapshots"]) == ("PLAIN_SNAPSHOTS", "lost")


def test_what_a_crash_left_of_a_plain_one_is_removed_before_anything_is_encrypted(tmp_path: Path) -> None:
    unfinished = tmp_path / "snapshots/.staged-s1"
    unfinished.mkdir(parents=True)
    refusal(tmp_path)
    assert not unfinished.exists()


@pytest.mark.parametrize("snapshot", ["s1", "fetched", "published"])
async def test_encrypted_ones_are_named_and_kept_while_encryption_is_off(
    tmp_path: Path, snapshot: str
) -> None:
    sealed = tmp_path / "snapshots/.sealed" / snapshot
    sealed.mkdir(parents=True)

    with structlog.testing.capture_logs() as logs:
        plain = opened(tmp_path)

    assert [entry["snapshots"] for entry in logs if entry["event"] == "encrypted_snapshots_ignored"] == [
        [snapshot]
    ]
    assert await plain.list() == []
    # One of the same id can be made, and does not touch it.
    await captured(plain, snapshot)
    await plain.delete(snapshot)
    assert sealed.exists()

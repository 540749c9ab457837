"""Which store the settings name, what is wrong with them, and that secrets stay secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dumont.errors import DumontError
from snapshotd.adapters.object_store.directory import DirectoryObjects
from snapshotd.adapters.object_store.s3 import S3Objects
from snapshotd.config import Settings
from snapshotd.failpoints import Failpoints
from snapshotd.object_store import PUBLIC_KEY, SIGNING_KEY, check, measure, open_objects, open_repository
from tests.unit.snapshotd.repository.world import a_node, an_image

SECRET = "a-secret-that-nobody-may-read"


def settings(**values: Any) -> Settings:
    return Settings.model_validate(values)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "S3_ENDPOINT": "http://127.0.0.1:9000",
        "S3_ACCESS_KEY": "access",
        "S3_SECRET_KEY": SECRET,
        "S3_REGION": "eu-central-1",
    }.items():
        monkeypatch.setenv(name, value)


def test_without_a_url_there_is_no_store(tmp_path: Path) -> None:
    assert open_objects(settings()) is None
    assert open_repository(settings(state_dir=tmp_path), Failpoints()) is None


def test_the_url_says_which_kind_of_store(tmp_path: Path) -> None:
    assert isinstance(open_objects(settings(store_url=f"file://{tmp_path}")), DirectoryObjects)
    bucket = open_objects(settings(store_url="s3://bucket/a/prefix"))
    assert isinstance(bucket, S3Objects)
    bucket.close()


def test_the_usual_variables_are_read_and_our_own_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    read = settings()
    assert (read.s3_endpoint, read.s3_access_key, read.s3_region) == (
        "http://127.0.0.1:9000",
        "access",
        "eu-central-1",
    )
    monkeypatch.setenv("DUMONT_SNAPSHOTD_S3_REGION", "us-west-2")
    assert settings().s3_region == "us-west-2"


def test_the_secret_is_in_no_text() -> None:
    read = settings(store_url="s3://bucket")
    assert read.s3_secret_key.get_secret_value() == SECRET
    assert SECRET not in f"{read!r} {read} {read.model_dump()} {read.model_dump_json()}"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"store_url": "ftp://x/y"}, "INVALID_STORE_URL"),
        ({"store_url": "s3://"}, "INVALID_STORE_URL"),
        ({"store_url": "file://relative/path"}, "INVALID_STORE_URL"),
        ({"store_url": "s3://bucket", "s3_endpoint": "127.0.0.1:9000"}, "INVALID_ENDPOINT"),
        ({"store_url": "s3://bucket", "s3_access_key": ""}, "STORE_CREDENTIALS_MISSING"),
        ({"store_url": "s3://bucket", "s3_secret_key": ""}, "STORE_CREDENTIALS_MISSING"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_sent(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(DumontError) as refusal:
        open_objects(settings(**changes))
    assert refusal.value.reason == reason
    assert SECRET not in refusal.value.message


def test_a_node_makes_its_keys_once_and_shows_the_public_one(tmp_path: Path) -> None:
    chosen = settings(state_dir=tmp_path, store_url=f"file://{tmp_path}/store")
    lines = []
    for _ in range(2):
        repository = open_repository(chosen, Failpoints())
        assert repository is not None
        repository.close()
        lines.append((tmp_path / PUBLIC_KEY).read_text())
    assert lines[0] == lines[1]
    assert lines[0].startswith("ed25519 ")
    assert (tmp_path / SIGNING_KEY).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("trusted_keys_file", "not a key", "TRUSTED_KEYS_UNREADABLE"),
        ("trusted_keys_file", None, "KEY_FILE_UNUSABLE"),
        ("encryption_key_file", "ab", "KEY_FILE_UNUSABLE"),
        ("encryption_key_file", None, "KEY_FILE_UNUSABLE"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_named(
    tmp_path: Path, file: str, content: str | None, reason: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.touch(mode=0o600)
        path.write_text(content)
    chosen = settings(state_dir=tmp_path, store_url=f"file://{tmp_path}/store", **{file: path})
    with pytest.raises(DumontError) as refusal:
        open_repository(chosen, Failpoints())
    assert refusal.value.reason == reason


async def test_the_doctor_is_told_whether_the_store_works(tmp_path: Path) -> None:
    (none,) = await check(settings())
    (works,) = await check(settings(store_url=f"file://{tmp_path}"))
    (wrong,) = await check(settings(store_url="s3://bucket", s3_secret_key=""))
    assert (none["passed"], works["passed"], wrong["passed"]) == (True, True, False)
    assert "STORE_CREDENTIALS_MISSING" in str(wrong["message"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_the_store_s_own_speed_is_that_of_a_snapshot_s_chunks(
    tmp_path: Path,
) -> None:
    objects = DirectoryObjects(tmp_path / "store")
    await a_node(objects).publish(an_image(tmp_path / "images"), tmp_path / "images")
    before = {item.key async for item in objects.list("")}

    speeds = await measure(settings(store_url=f"file://{tmp_path}/store"), "s1")

    assert set(speeds) == {"raw_write_mb_per_s", "raw_read_mb_per_s"}
    assert min(speeds.values()) > 0
    assert {item.key async for item in objects.list("")} == before

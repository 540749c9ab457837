"""Nothing on a node grows without end unless an operator says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from snapshotd.assembly import models_limit, snapshot_limit
from snapshotd.config import Settings

DISK = 1000 << 30


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(DISK, 0, DISK)
    monkeypatch.setattr("snapshotd.assembly.shutil.disk_usage", lambda _: usage)


def settings(state: Path, **given: Any) -> Settings:
    return Settings.model_validate({"state_dir": state, "models_dir": state / "models", **given})


def test_snapshots_and_models_have_their_share_of_the_disk(tmp_path: Path) -> None:
    assert snapshot_limit(settings(tmp_path)) == DISK // 4
    assert models_limit(settings(tmp_path)) == DISK // 2


def test_a_file_system_of_their_own_is_nearly_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    assert snapshot_limit(settings(tmp_path, cache_dir=tmp_path)) == DISK * 9 // 10


def test_what_an_operator_sets_holds_and_0_is_no_limit(tmp_path: Path) -> None:
    for value in (0, 5 << 30):
        given = settings(tmp_path, cache_bytes=value, models_bytes=value)
        assert (snapshot_limit(given), models_limit(given)) == (value, value)

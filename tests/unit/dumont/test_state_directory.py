"""One process per state directory, and the second one learns who the first is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dumont.errors import FailedPrecondition
from dumont.state_directory import locked, make_private


def test_the_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "dumont-controller", "127.0.0.1:7070"):
        with (
            pytest.raises(FailedPrecondition) as refusal,
            locked(tmp_path / "lock", "dumont-controller", "x:1"),
        ):
            pass
        assert refusal.value.reason == "STATE_IN_USE"
        assert f"dumont-controller with process id {os.getpid()}, on 127.0.0.1:7070" in refusal.value.message
    with locked(tmp_path / "lock", "dumont-controller", "x:1"):
        pass


def test_a_holder_that_has_not_said_who_it_is_yet_holds_it_all_the_same(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "dumont-controller", "127.0.0.1:7070"):
        (tmp_path / "lock").write_text("")
        with (
            pytest.raises(FailedPrecondition, match="another process holds"),
            locked(tmp_path / "lock", "dumont-controller", "x:1"),
        ):
            pass


def test_a_state_directory_is_private(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    make_private(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition) as refusal:
        make_private(tmp_path / "file")
    assert refusal.value.reason == "STATE_UNUSABLE"

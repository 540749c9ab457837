"""Who a controller is, and which database it may use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from controller.adapters import identity_file
from controller.identity import Established, Identity, establish
from dumont.errors import FailedPrecondition

MINE, THEIRS = Identity("mine", 3), Identity("theirs", 9)


@dataclass(frozen=True)
class Start:
    stored: Identity | None = None
    remembered: Identity | None = None
    empty: bool = False
    wanted: str = ""
    accept: bool = False

    def establish(self) -> Established:
        return establish(
            self.stored,
            self.remembered,
            empty=self.empty,
            wanted=self.wanted,
            accept=self.accept,
            new_id="new",
        )


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (Start(empty=True), Established(Identity("new", 1))),
        (Start(empty=True, wanted="lost"), Established(Identity("lost", 1))),
        (Start(MINE, MINE), Established(Identity("mine", 4))),
        (Start(MINE, None), Established(Identity("mine", 4))),
        (Start(replace(MINE, starts=2), MINE), Established(Identity("mine", 4), outdated=True)),
        # A backup of a version that had no identities yet.
        (Start(None, MINE), Established(Identity("mine", 4), outdated=True)),
        (Start(None, MINE, empty=True, accept=True), Established(Identity("mine", 4), outdated=True)),
        (Start(THEIRS, MINE, accept=True), Established(Identity("theirs", 10))),
    ],
    ids=[
        "the first start",
        "in place of a lost one",
        "once more",
        "with a new state directory",
        "with an old copy of the database",
        "with a very old copy",
        "with an empty database that a person accepts",
        "with another's database that a person accepts",
    ],
)
def test_a_controller_stays_who_it_is(start: Start, expected: Established) -> None:
    assert start.establish() == expected


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (Start(None, MINE, empty=True), "DATABASE_EMPTY"),
        (Start(THEIRS, MINE), "DATABASE_FOREIGN"),
        (Start(MINE, MINE, wanted="other"), "CONTROLLER_ID_TAKEN"),
        (Start(None, MINE, empty=True, accept=True, wanted="other"), "CONTROLLER_ID_TAKEN"),
    ],
)
def test_a_database_that_is_not_the_one_of_last_time_is_refused(start: Start, reason: str) -> None:
    with pytest.raises(FailedPrecondition) as refusal:
        start.establish()
    assert refusal.value.reason == reason
    assert "mine" in refusal.value.message


def test_the_state_directory_remembers_the_last_start(tmp_path: Path) -> None:
    assert identity_file.read(tmp_path) is None
    identity_file.write(tmp_path, MINE)
    identity_file.write(tmp_path, THEIRS)
    assert identity_file.read(tmp_path) == THEIRS


def test_a_damaged_memory_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / identity_file.NAME).write_text("{")
    with pytest.raises(FailedPrecondition) as refusal:
        identity_file.read(tmp_path)
    assert refusal.value.reason == "STATE_UNUSABLE"

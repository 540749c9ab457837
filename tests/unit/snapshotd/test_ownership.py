"""A node takes commands of one controller, and names it when another comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dumont.errors import FailedPrecondition
from dumont.sessions import Sessions
from snapshotd.service.ownership import Ownership


def test_a_node_of_nobody_takes_commands_of_anybody(tmp_path: Path) -> None:
    ownership = Ownership(tmp_path / "controller")
    ownership.check("first")
    ownership.claim("")
    ownership.check("second")


def test_a_node_belongs_to_the_first_controller_across_restarts(tmp_path: Path) -> None:
    Ownership(tmp_path / "controller").claim("first")
    ownership = Ownership(tmp_path / "controller")
    ownership.check("first")
    with pytest.raises(FailedPrecondition, match="belongs to controller first") as refusal:
        ownership.check("second")
    assert refusal.value.reason == "WRONG_CONTROLLER"
    assert refusal.value.metadata == {"controller": "first", "caller": "second"}


def test_a_node_that_is_told_to_belongs_to_another_one(tmp_path: Path) -> None:
    ownership = Ownership(tmp_path / "controller")
    ownership.claim("first")
    ownership.claim("second")
    ownership.check("second")
    with pytest.raises(FailedPrecondition, match="belongs to controller second"):
        ownership.check("first")


def test_whom_a_node_belongs_to_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given: a disk that has after a power cut what was synced, and nothing else
    durable: dict[str, str] = {}

    def sync(path: Path) -> None:
        inside = " ".join(entry.name for entry in path.iterdir()) if path.is_dir() else path.read_text()
        durable[path.name] = inside

    monkeypatch.setattr("snapshotd.service.ownership.sync", sync)

    Ownership(tmp_path / "controller").claim("first")

    # then: the content is there before its name is
    assert list(durable.items()) == [("controller.new", "first"), (tmp_path.name, "controller")]


async def test_the_commands_of_a_session_that_has_ended_are_refused_also_after_a_restart(
    tmp_path: Path,
) -> None:
    # given: a node that two controllers use
    ownership = Ownership(tmp_path / "controller")
    ownership.claim("fleet")
    await ownership.learn(Sessions(4, frozenset({3, 4})))
    ownership.check_session(3)
    # when: one takes the other's place
    await ownership.learn(Sessions(4, frozenset({4})))
    # then
    for known in (ownership, Ownership(tmp_path / "controller")):
        known.check_session(4)
        known.check_session(5)
        with pytest.raises(FailedPrecondition) as refusal:
            known.check_session(3)
        assert (refusal.value.reason, refusal.value.metadata["highest"]) == ("SESSION_ENDED", "4")


async def test_what_is_known_already_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ownership = Ownership(tmp_path / "controller")
    await ownership.learn(Sessions(4, frozenset({3, 4})))
    monkeypatch.setattr("snapshotd.service.ownership._write", None)
    await ownership.learn(Sessions(4, frozenset({3, 4})))
    await ownership.learn(Sessions(3, frozenset({3})))


def test_a_command_over_a_connection_that_was_replaced_is_late(tmp_path: Path) -> None:
    ownership = Ownership(tmp_path / "controller")
    ownership.check_session(3, 1)
    ownership.check_session(3, 2)
    ownership.check_session(7, 1)
    with pytest.raises(FailedPrecondition) as refusal:
        ownership.check_session(3, 1)
    assert refusal.value.reason == "COMMAND_LATE"


async def test_the_sessions_of_another_fleet_mean_nothing(tmp_path: Path) -> None:
    ownership = Ownership(tmp_path / "controller")
    ownership.claim("first")
    await ownership.learn(Sessions(9, frozenset({9})))
    ownership.claim("second")
    for known in (ownership, Ownership(tmp_path / "controller")):
        known.check_session(1)

"""A node takes commands of one controller, and names it when another comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dumont.errors import FailedPrecondition
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

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

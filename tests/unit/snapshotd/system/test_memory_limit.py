"""The memory of a model host is bound by a cgroup, of either version, where the machine has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotd.system import memory_limit
from snapshotd.system.memory_limit import MemoryLimit


@pytest.fixture
def v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a kernel with cgroup v2 alone shows of the group of a shim."""
    monkeypatch.setattr(memory_limit, "cgroup2_root", lambda: tmp_path)
    monkeypatch.setattr(memory_limit, "memory_root", lambda: None)
    group = tmp_path / "dumont" / "shim-a"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max")
    return group


@pytest.fixture
def v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory_limit, "cgroup2_root", lambda: None)
    monkeypatch.setattr(memory_limit, "memory_root", lambda: tmp_path)
    return tmp_path / "dumont" / "shim-a"


def test_with_version_2_the_controller_is_switched_on_and_the_limit_set(v2: Path) -> None:
    limit = MemoryLimit.create("shim-a", 42, 1000)

    assert limit == MemoryLimit(v2, 1000)
    assert (v2 / "memory.max").read_text() == "1000"
    assert (v2 / "cgroup.procs").read_text() == "42"
    for parent in (v2.parents[1], v2.parent):
        assert (parent / "cgroup.subtree_control").read_text() == "+memory"


def test_with_version_1_it_is_a_group_of_the_memory_hierarchy(v1: Path) -> None:
    assert MemoryLimit.create("shim-a", 42, 1000) == MemoryLimit(v1, 1000)
    assert (v1 / "memory.limit_in_bytes").read_text() == "1000"


@pytest.mark.parametrize("name", ["memory.events", "memory.oom_control"])
def test_an_end_for_want_of_memory_is_told_from_others(tmp_path: Path, name: str) -> None:
    limit = MemoryLimit(tmp_path, 1000)
    assert not limit.exceeded()

    (tmp_path / name).write_text("oom 0\noom_kill 0\n")
    assert not limit.exceeded()

    (tmp_path / name).write_text("oom 2\noom_kill 1\n")
    assert limit.exceeded()


def test_a_machine_without_either_sets_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "cgroup2_root", lambda: None)
    monkeypatch.setattr(memory_limit, "memory_root", lambda: None)

    assert MemoryLimit.create("shim-a", 42, 1000) == MemoryLimit(None, 0)


def test_no_limit_is_none(v2: Path) -> None:
    assert MemoryLimit.create("shim-a", 42, 0) == MemoryLimit(None, 0)
    assert (v2 / "memory.max").read_text() == "max"


@pytest.mark.parametrize(
    ("controllers", "v1", "found"), [("cpu memory", False, 2), ("cpu", True, 1), ("cpu", False, 0)]
)
def test_which_version_bounds_memory_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controllers: str, v1: bool, found: int
) -> None:
    (tmp_path / "cgroup.controllers").write_text(controllers)
    monkeypatch.setattr(memory_limit, "cgroup2_root", lambda: tmp_path)
    monkeypatch.setattr(memory_limit, "memory_root", lambda: tmp_path if v1 else None)

    assert memory_limit.version() == found

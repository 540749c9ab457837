"""The stock pipeline that the bench compares with: real CRIU, and a recorded stand-in for cuda-checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dumont.benchmarks import configs
from dumont.benchmarks.stock import Stock
from dumont.errors import DumontError, Internal

pytestmark = pytest.mark.node

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def model(root: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    configs.build("qwen3-tiny", directory)
    return directory


def tool(directory: Path, script: str) -> Path:
    """A command that stands in for cuda-checkpoint."""
    path = directory / "cuda-checkpoint"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_it_comes_back_from_one_image_as_often_as_asked(criu: Path, model: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.touch()
    # Whether the process lives, and what is asked for it.
    command = tool(tmp_path, f'kill -0 "$3" && echo "$1 $2 $3" >> {said}')
    with Stock(model, tmp_path / "stock", criu, command, "The capital of France is", 4) as stock:
        assert stock.pid == 0  # dumped, and dead
        assert stock.pause.keys() == {"cuda_checkpoint", "dump"}
        first, second = stock.measure(), stock.measure()
        assert stock.pid == 0
    assert first.tokens == second.tokens
    assert len(first.tokens) == 4
    assert list(first.phases) == ["criu", "cuda_restore", "first_token"]
    assert sum(first.phases.values()) == pytest.approx(first.seconds)
    toggles = said.read_text().splitlines()
    assert len(toggles) == 3  # before the dump, and after each restore
    assert len(set(toggles)) == 1  # the same process each time
    assert toggles[0].startswith("--toggle --pid ")


def test_a_tool_that_fails_says_why_and_leaves_no_process(criu: Path, model: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = tool(tmp_path, f'echo "$3" > {said}; echo "driver too old" >&2; exit 3')
    with pytest.raises(Internal, match="status 3: driver too old") as failed:
        Stock(model, tmp_path / "stock", criu, command, "Hello", 4).__enter__()
    assert failed.value.reason == "STOCK_FAILED"
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), 0)


@pytest.fixture
def no_ghosts() -> Iterator[None]:
    """Removes what a killed CRIU leaves of files that had no name when they were dumped."""
    before = set(SHARED_MEMORY.glob("*.ghost"))
    yield
    for ghost in set(SHARED_MEMORY.glob("*.ghost")) - before:
        ghost.unlink()


@pytest.mark.usefixtures("no_ghosts")
@pytest.mark.parametrize(("hook", "reason"), [("sleep 600", "STOCK_TIMEOUT"), ("exit 1", "STOCK_FAILED")])
def test_a_restore_that_ends_half_way_leaves_no_process(
    criu: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str, reason: str
) -> None:
    # Called by CRIU when all of the process is there and does not run yet.
    script = tmp_path / "hook"
    reached = tmp_path / "reached"
    script.write_text(
        f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-restore ] || exit 0\ntouch {reached}\n{hook}\n'
    )
    script.chmod(0o755)
    halting = tmp_path / "criu"
    halting.write_text(f'#!/bin/sh\nexec {criu} "$@" --action-script {script}\n')
    halting.chmod(0o755)
    with Stock(model, tmp_path / "stock", criu, None, "Hello", 4) as stock:
        stock.criu = halting
        monkeypatch.setattr("dumont.benchmarks.stock.STEP_SECONDS", 5.0)
        with pytest.raises(DumontError) as failed:
            stock.measure()
        assert failed.value.reason == reason
        assert reached.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(stock.dumped, 0)


def test_a_process_that_cannot_load_its_model_says_why(criu: Path, tmp_path: Path) -> None:
    with pytest.raises(Internal, match="ended before its ready") as failed:
        Stock(tmp_path / "no-model", tmp_path / "stock", criu, None, "Hello", 4).__enter__()
    assert failed.value.reason == "STOCK_FAILED"

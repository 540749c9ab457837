"""Which backend drives CUDA processes, and what is said when there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dumont.errors import FailedPrecondition
from snapshotd import assembly, preflight
from snapshotd.adapters.cuda import backend as cuda_backend
from snapshotd.adapters.cuda.agent import CudaAgent
from snapshotd.adapters.cuda.cli import CudaCheckpoint
from snapshotd.config import Settings


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "cuda-checkpoint"
    path.parent.mkdir()
    path.touch(mode=0o755)
    return path


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "missing_for_driver", lambda: "cuda-core is not installed")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "missing_for_driver", lambda: "")


@pytest.mark.parametrize("backend", ["auto", "driver"])
def test_the_driver_comes_first(driver: None, program: Path, backend: str) -> None:
    assert isinstance(cuda_backend.choose(backend, program), CudaAgent)


def test_who_wants_the_program_gets_it(driver: None, program: Path) -> None:
    chosen = cuda_backend.choose("cli", program)
    assert isinstance(chosen, CudaCheckpoint)
    assert chosen.binary == program


def test_without_the_driver_it_is_the_program_on_the_path(
    no_driver: None, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(program.parent))
    chosen = cuda_backend.choose("auto", None)
    assert isinstance(chosen, CudaCheckpoint)
    assert chosen.binary == program


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("driver", ["cuda-core is not installed"]),
        ("cli", ["cuda-checkpoint", "--cuda-checkpoint"]),
        ("auto", ["cuda-core is not installed", "--cuda-checkpoint", "--device cpu"]),
    ],
)
def test_what_is_missing_is_told_with_what_to_do(
    no_driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, said: list[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for program in (None, tmp_path / "absent"):
        with pytest.raises(FailedPrecondition) as refusal:
            cuda_backend.choose(backend, program)
        assert refusal.value.reason == "NO_CUDA_BACKEND"
        assert [part for part in said if part not in refusal.value.message] == []


def test_a_node_that_cannot_suspend_processes_starts_all_the_same(
    no_driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given neither of the backends
    monkeypatch.setenv("PATH", str(tmp_path))

    # Then the node says why, and refuses only if one was asked for
    cuda, why = assembly.open_cuda(Settings(), "570.86.15")
    assert cuda is None
    assert "cuda-core is not installed" in why
    with pytest.raises(FailedPrecondition):
        assembly.open_cuda(Settings(cuda_backend="driver"), "570.86.15")


def test_an_old_driver_is_not_asked_to_suspend_processes(driver: None) -> None:
    cuda, why = assembly.open_cuda(Settings(), "550.54.15")
    assert cuda is None
    assert "550.54.15" in why
    assert "570" in why

    cuda, why = assembly.open_cuda(Settings(), "570.86.15")
    assert isinstance(cuda, CudaAgent)
    assert why == ""


@pytest.mark.parametrize(("driver", "package"), [("550.54.15", True), ("570.86.15", False)])
def test_a_gpu_that_cannot_be_suspended_keeps_no_node_from_starting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str, package: bool
) -> None:
    (tmp_path / "version").write_text(f"{driver}\n")
    monkeypatch.setattr(preflight, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if package else None)

    finding = preflight._check_gpu()

    assert not finding.passed
    assert "start cold" in finding.message
    assert preflight.problems([finding]) == []


def test_the_program_is_named_by_flag_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().cuda_checkpoint is None
    assert Settings().cuda_backend == "auto"
    monkeypatch.setenv("DUMONT_CUDA_CHECKPOINT", "/opt/cuda-checkpoint")
    assert Settings().cuda_checkpoint == Path("/opt/cuda-checkpoint")
    assert Settings(cuda_checkpoint=Path("/other")).cuda_checkpoint == Path("/other")

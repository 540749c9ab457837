"""What scripts/gpu-test says of a machine before it runs a test there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import machine
from tests.gpu.machine import Requirement

ROOT = Path(__file__).parents[2]
NO_DRIVER = """
class NVMLError(Exception):
    pass


def nvmlInit():
    raise NVMLError("there is no driver")
"""


def test_everything_is_told_and_one_thing_missing_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.chosen([Requirement(True, "root"), Requirement(True, "packages")])
    assert not machine.chosen([Requirement(False, "no driver"), Requirement(True, "CRIU")])
    assert capsys.readouterr().err.splitlines() == [
        "ok   root",
        "ok   packages",
        "MISS no driver",
        "ok   CRIU",
    ]


@pytest.mark.parametrize(("count", "choice"), [(1, "gpu and not gpus2"), (2, "gpu"), (8, "gpu")])
def test_tests_for_two_gpus_are_chosen_where_there_are_two_and_else_said_to_be_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int, choice: str
) -> None:
    monkeypatch.setattr(machine, "requirements", list)
    monkeypatch.setattr(machine, "twins", lambda: count)
    machine.main()
    said = capsys.readouterr()
    assert said.out.strip() == choice
    assert ("left out" in said.err) is (count < 2)


def test_without_a_gpu_no_test_is_run_and_what_is_missing_is_said(tmp_path: Path) -> None:
    # given a machine whose NVML finds no driver
    (tmp_path / "pynvml.py").write_text(NO_DRIVER)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [ROOT / "scripts/gpu-test"], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 1
    assert "MISS no NVIDIA driver" in ran.stderr
    assert "GPU tests cannot run on this machine" in ran.stderr
    assert ran.stdout == ""

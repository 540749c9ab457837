"""The doctor passes on what the node's own checks say, and survives their absence."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from typer.testing import CliRunner

from dumont import doctor
from dumont.cli.main import app
from dumont.errors import Unavailable

FINDINGS = [
    {"check": "criu", "passed": False, "message": "there is no criu; run scripts/setup"},
    {"check": "gpu", "passed": True, "message": "no NVIDIA driver; models run on the CPU"},
]


class Unreachable:
    """A client whose controller does not answer."""

    def __init__(self, endpoint: str | None) -> None:
        self.nodes = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def list(self) -> list[Any]:
        raise Unavailable("ENDPOINT_UNREACHABLE", "no controller answers; start one with `dumont up`")


@pytest.fixture
def preflight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets what the node's checks say; there is no model and no controller."""
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setenv("DUMONT_SNAPSHOTD_MODELS_DIR", str(tmp_path))
    monkeypatch.setattr("dumont.sync.Client", Unreachable)

    def says(stdout: str, stderr: str = "") -> None:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            assert command[1:] == ["-m", "snapshotd.preflight", "--json"]
            return subprocess.CompletedProcess(command, 1, stdout, stderr)

        monkeypatch.setattr("dumont.doctor.subprocess.run", run)

    return says


def test_what_the_node_lacks_is_listed_with_the_remedy_and_fails(preflight: Callable[..., None]) -> None:
    preflight(json.dumps(FINDINGS))
    result = CliRunner().invoke(app, ["doctor"])
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    assert result.exit_code == 1
    assert lines["criu"] == "missing there is no criu; run scripts/setup"
    assert lines["gpu"] == "ok no NVIDIA driver; models run on the CPU"
    assert "dumont up" in lines["controller"]


def test_what_only_makes_starts_slower_is_told_and_does_not_fail(preflight: Callable[..., None]) -> None:
    note = {"check": "gpu_mig", "passed": False, "needed": False, "message": "MIG is enabled on GPU-a"}
    preflight(json.dumps([FINDINGS[1], note]))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "MIG is enabled on GPU-a" in result.stdout


def test_missing_models_and_controller_are_told_but_do_not_fail(preflight: Callable[..., None]) -> None:
    preflight(json.dumps(FINDINGS[1:]))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    checks = {check["check"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert [(checks[name]["passed"], checks[name]["needed"]) for name in ("models", "controller")] == [
        (False, False), (False, False),
    ]  # fmt: skip


def test_cached_models_are_counted(preflight: Callable[..., None], tmp_path: Path) -> None:
    preflight(json.dumps([]))
    (tmp_path / "org/model").mkdir(parents=True)
    (tmp_path / "org/model/config.json").touch()
    (check,) = [check for check in doctor.examine() if check.check == "models"]
    assert check.passed
    assert check.message == f"{tmp_path}: 1"


@pytest.mark.parametrize("stdout", ["", "not JSON", "[{}]", "5"])
def test_checks_that_break_are_a_finding_themselves(preflight: Callable[..., None], stdout: str) -> None:
    preflight(stdout, stderr="Traceback\nImportError: no torch\n")
    (check,) = [check for check in doctor.examine() if check.check == "preflight"]
    assert (check.passed, check.needed) == (False, True)
    assert check.message.endswith("ImportError: no torch")


def test_a_machine_with_the_client_alone_has_nothing_to_pass(
    preflight: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    checks = {check.check: check for check in doctor.examine()}
    assert not checks["services"].needed
    assert "dumont-services[controller,node]" in checks["services"].message
    assert not [check for check in checks.values() if check.needed and not check.passed]

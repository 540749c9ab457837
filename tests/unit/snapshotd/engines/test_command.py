"""``dumont engine`` and what ``dumont doctor`` says of engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dumont.cli.main import app
from snapshotd.engines import installed
from snapshotd.engines.installed import Installed
from snapshotd.model import Finding
from snapshotd.preflight import ENGINE_PYTHON, check_engines
from tests.helpers.stand_in_engine import stand_in


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where environments are found."""
    monkeypatch.setenv("DUMONT_CACHE", str(tmp_path))
    monkeypatch.delenv(ENGINE_PYTHON, raising=False)
    return tmp_path / "engines"


def put(engines: Path, version: str, **versions: str) -> Path:
    directory = engines / "vllm" / version
    python = stand_in(directory, **({"vllm": version} | versions))
    installed.write(Installed("vllm", version, "cpu", directory, "lock"))
    return python


def listed(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["engine", "ls", "--json"])
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_ls_marks_what_is_used_and_tells_what_could_be_installed(
    engines: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = listed(capfd)
    assert {(row["build"], row["state"], row["used"]) for row in rows} == {
        ("cpu", "not installed", False),
        ("cuda", "not installed", False),
    }

    older, newer = put(engines, "0.31.0"), put(engines, "0.40.0")

    there = {row["python"]: row for row in listed(capfd) if row["state"] == "installed"}
    assert {python: row["used"] for python, row in there.items()} == {str(older): False, str(newer): True}
    shown = CliRunner().invoke(app, ["engine", "ls"]).stdout
    assert "0.40.0" in shown


def test_ls_shows_the_interpreter_that_the_environment_names(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    put(engines, "0.40.0")
    own = stand_in(tmp_path / "own", vllm="0.33.0")
    monkeypatch.setenv(ENGINE_PYTHON, f"vllm={own}")

    used = [row for row in listed(capfd) if row["used"]]

    assert [(row["version"], row["state"], row["python"]) for row in used] == [("0.33.0", "named", str(own))]


def test_install_refuses_what_is_not_pinned(engines: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["engine", "install", "vllm", "--version", "0.0.1", "--build", "cpu"])
    assert result.exit_code == 1
    assert "VERSION_NOT_PINNED" in capfd.readouterr().err
    assert not engines.exists()


def test_ls_tells_an_error_as_json_where_that_is_asked_for(
    engines: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENGINE_PYTHON, "nonsense")
    as_json = CliRunner().invoke(app, ["engine", "ls", "--json"])
    assert as_json.exit_code == 1
    reason = json.loads(as_json.stdout)["error"]["reason"]
    capfd.readouterr()

    assert CliRunner().invoke(app, ["engine", "ls"]).exit_code == 1
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.endswith(f"[{reason}]\n")


def test_a_refused_install_is_told_as_json_where_that_is_asked_for(
    engines: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = CliRunner().invoke(app, ["engine", "install", "nothing", "--json"])
    assert result.exit_code == 1
    said = capfd.readouterr()
    error = json.loads(said.out)["error"]
    assert (error["code"], error["reason"], error["field"]) == (
        "INVALID_ARGUMENT",
        "UNKNOWN_ENGINE",
        "engine",
    )
    assert said.err == ""


def finding() -> Finding:
    (found,) = check_engines()
    assert not found.needed
    return found


def test_doctor_says_which_engine_there_is_and_what_it_lacks(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "dumont engine install vllm" in finding().message
    assert not finding().passed

    python = put(engines, "0.32.0")
    assert finding().passed
    assert f"vllm 0.32.0 at {python}" in finding().message

    put(engines, "0.40.0", grpcio="")
    assert not finding().passed
    assert "it lacks grpcio" in finding().message

    monkeypatch.setenv(ENGINE_PYTHON, f"vllm={tmp_path}/gone")
    assert "no such program" in finding().message
    monkeypatch.setenv(ENGINE_PYTHON, "nonsense")
    assert (finding().check, finding().passed) == ("engines", False)

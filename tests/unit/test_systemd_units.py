"""The units in deploy/systemd: systemd understands them, and the services understand what they set."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from controller import config as controller
from snapshotd import config as snapshotd
from tests.conftest import require
from tests.helpers.systemd_unit import UNITS, environment, read

NAMES = ("dumont-controller", "dumont-snapshotd")
SYSTEM_UNITS = Path("/usr/lib/systemd/system")


def verify(root: Path) -> str:
    """What systemd says of the units below ``root``; nothing when all is well."""
    done = subprocess.run(
        ["systemd-analyze", "verify", f"--root={root}", *(f"{name}.service" for name in NAMES)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return f"{done.stdout}{done.stderr}" + (f"exit status {done.returncode}" if done.returncode else "")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The file system of a machine on which Dumont is installed as the units say."""
    require(shutil.which("systemd-analyze") is not None, "systemd is not installed")
    shutil.copytree(SYSTEM_UNITS, tmp_path / "usr/lib/systemd/system", symlinks=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    target = tmp_path / "etc/systemd/system"
    target.mkdir(parents=True)
    for name in NAMES:
        shutil.copy(UNITS / f"{name}.service", target)
        (program,) = read(name)["ExecStart"]
        command = tmp_path / program.lstrip("/")
        command.parent.mkdir(parents=True, exist_ok=True)
        command.write_text("#!/bin/sh\n")
        command.chmod(0o755)
    return tmp_path


def test_systemd_understands_every_line(machine: Path) -> None:
    assert verify(machine) == ""


def test_a_line_that_systemd_does_not_understand_would_be_seen(machine: Path) -> None:
    unit = machine / "etc/systemd/system/dumont-snapshotd.service"
    unit.write_text(unit.read_text().replace("KillMode=", "KillMood="))
    assert "KillMood" in verify(machine)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_lies_where_systemd_lets_it_be_written(name: str) -> None:
    unit = read(name)
    variable = f"{name.replace('-', '_').upper()}_STATE_DIR"
    (directory,) = unit["StateDirectory"]
    assert environment(name, "/var/lib")[variable] == f"/var/lib/{directory}"
    assert unit["StateDirectoryMode"] == ["0700"]


def test_a_node_registers_with_the_controller_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        for variable, value in environment(name, "/var/lib").items():
            monkeypatch.setenv(variable, value)
    assert snapshotd.Settings().controller == controller.load([]).listen


@pytest.mark.parametrize("name", NAMES)
def test_what_the_operator_sets_comes_last(name: str) -> None:
    lines = (UNITS / f"{name}.service").read_text().splitlines()
    own = max(number for number, line in enumerate(lines) if line.startswith("Environment="))
    assert lines.index(f"EnvironmentFile=-/etc/dumont/{name.removeprefix('dumont-')}.env") > own


def test_models_outlive_a_restart_of_their_daemon_and_end_alone() -> None:
    unit = read("dumont-snapshotd")
    assert unit["KillMode"] == ["process"]
    assert unit["OOMPolicy"] == ["continue"]

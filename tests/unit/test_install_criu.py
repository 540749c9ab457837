"""Where scripts/install-criu takes CRIU from, and what it says where it finds none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "install-criu"
TOOLS = ("awk", "bash", "cat", "dirname", "dpkg", "env", "find", "head", "mkdir", "mktemp", "realpath", "rm")
UBUNTU = "http://ubuntu.test/ubuntu Ubuntu\n"
DEBIAN = "http://debian.test/debian Debian\n"
# Answers from the folder it is in, keeps the sources that it is given, and has no package.
APT = """#!/bin/bash
for word; do
  case $word in
    Dir::Etc::SourceList=*) cp "${word#*=}" "$FOLDER/sources" ;;
    indextargets) exec cat "$FOLDER/targets" ;;
    update) exit "$(cat "$FOLDER/update")" ;;
    install) exit 1 ;;
  esac
done
"""


class Machine:
    """One on which only some programs are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in (*TOOLS, "cp"):
            (self.programs / name).symlink_to(str(shutil.which(name)))
        self.keyring = folder / "keyring.gpg"
        self.keyring.touch()
        (folder / "update").write_text("0")
        (folder / "targets").touch()

    def has(self, name: str, text: str = "#!/bin/sh\n") -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def archives(self, targets: str) -> None:
        (self.folder / "targets").write_text(targets)

    def install(self, **variables: str) -> str:
        """What the script says; it always fails here."""
        done = subprocess.run(
            [SCRIPT, str(self.folder / "prefix")],
            env={
                "PATH": str(self.programs),
                "FOLDER": str(self.folder),
                "DUMONT_DEBIAN_KEYRING": str(self.keyring),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert not (self.folder / "prefix").exists()
        return done.stderr

    def source(self) -> list[str]:
        """The words of the line that apt was told to read."""
        return (self.folder / "sources").read_text().split()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Debian or something that comes from it."""
    made = Machine(tmp_path)
    for name in ("dpkg-deb", "patchelf"):
        made.has(name)
    made.has("apt-get", APT)
    return made


def test_the_archive_that_apt_is_configured_for_is_taken(machine: Machine) -> None:
    machine.archives(UBUNTU + DEBIAN)
    machine.install()
    assert machine.source()[3:] == ["http://debian.test/debian", "trixie", "main"]
    assert machine.source()[2].endswith(f"signed-by={machine.keyring}]")


def test_ubuntu_is_not_taken_for_debian_and_the_ways_out_are_named(machine: Machine) -> None:
    machine.archives(UBUNTU)
    said = machine.install()
    assert not (machine.folder / "sources").exists()
    assert "DUMONT_DEBIAN_MIRROR=" in said
    assert "ppa:criu/ppa" in said


def test_an_archive_that_is_named_is_taken_on_ubuntu(machine: Machine) -> None:
    machine.archives(UBUNTU)
    machine.install(DUMONT_DEBIAN_MIRROR="http://named.test/debian")
    assert machine.source()[3] == "http://named.test/debian"


def test_an_archive_that_is_named_comes_before_a_configured_one(machine: Machine) -> None:
    machine.archives(DEBIAN)
    machine.install(DUMONT_DEBIAN_MIRROR="http://named.test/debian")
    assert machine.source()[3] == "http://named.test/debian"


def test_nothing_is_taken_without_keys_to_verify_it(machine: Machine) -> None:
    machine.archives(DEBIAN)
    machine.keyring.unlink()
    said = machine.install()
    assert not (machine.folder / "sources").exists()
    assert "debian-archive-keyring" in said
    assert "DUMONT_DEBIAN_KEYRING=" in said


def test_keys_that_are_too_old_are_named_as_the_likely_cause(machine: Machine) -> None:
    machine.archives(DEBIAN)
    (machine.folder / "update").write_text("100")
    assert f"{machine.keyring} is older than its keys" in machine.install()


def test_where_there_is_no_apt_another_way_is_named(machine: Machine) -> None:
    (machine.programs / "apt-get").unlink()
    said = machine.install()
    assert "this machine has no apt" in said
    assert str(machine.folder / "prefix") in said


def test_what_was_installed_once_is_left_alone(machine: Machine) -> None:
    prefix = machine.folder / "prefix"
    prefix.mkdir()
    (prefix / ".complete").touch()
    done = subprocess.run([SCRIPT, str(prefix)], env={"PATH": str(machine.programs)}, check=False)
    assert done.returncode == 0

"""Installing an engine: pinned, repeatable, and nothing left of an attempt that failed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from dumont.engines import INSTALLED
from dumont.errors import (
    Aborted,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from snapshotd.engines import install, installed
from snapshotd.engines.install import Lock
from tests.helpers.stand_in_engine import program, stand_in

TEXT = """# Packages.
# python: 3.11 3.12
# machine: x86_64
# download: 1000
# disk: 4000
one==1.0 \\
    --hash=sha256:aa
two==2.0 \\
    --hash=sha256:bb \\
    --hash=sha256:cc
"""
LOCK = install.parse_lock("vllm-0.32.0-cpu.txt", TEXT)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def a_python(directory: Path, pip: str = "exit 0", imports: str = "exit 0", version: str = "3.11") -> str:
    """An interpreter whose environments hold a stand-in for vLLM.

    Args:
        pip: what ``pip install`` does there, in shell.
        imports: what an import of the engine does.
        version: of Python.
    """
    answer = stand_in(directory / "answers").read_text().partition("\n")[2]
    inner = directory / "inner"
    program(
        inner,
        f'case "$*" in\n'
        f'*"-m pip"*) {pip};;\n*"LLMEngine"*) {imports};;\n*)\n'
        + answer.replace(str(directory / "answers"), "PREFIX")
        + ";;\nesac\n",
    )
    make = f'mkdir -p "$3/bin" && sed "s#PREFIX#$3#" {inner} > "$3/bin/python" && chmod +x "$3/bin/python"'
    return str(program(directory / "python", f'case "$2" in\nvenv) {make};;\n*) echo {version};;\nesac\n'))


class Made(NamedTuple):
    lines: list[str]
    directory: Path
    new: bool


def make(root: Path, python: str, lock: Lock = LOCK, directory: Path | None = None) -> Made:
    lines: list[str] = []
    one, new = install.install(lock, root, directory, python, lines.append)
    return Made(lines, one.directory, new)


def test_the_list_of_packages_says_what_it_is_for() -> None:
    assert (LOCK.engine, LOCK.version, LOCK.build) == ("vllm", "0.32.0", "cpu")
    assert (LOCK.pythons, LOCK.machine, LOCK.packages) == (("3.11", "3.12"), "x86_64", 2)
    assert (LOCK.download, LOCK.disk) == (1000, 4000)


def test_every_package_that_is_pinned_here_has_a_hash_and_occurs_once() -> None:
    known = install.locks()
    assert {lock.engine for lock in known} == INSTALLED
    assert {lock.build for lock in known} == {"cpu", "cuda"}
    for lock in known:
        requirements = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", lock.text, flags=re.MULTILINE).strip())
        assert len(requirements) == lock.packages
        names = [requirement.partition("==")[0] for requirement in requirements]
        assert len(set(names)) == len(names)
        assert {"torch", "grpcio", "grpcio-status", "protobuf", "jinja2"} <= set(names)
        for requirement in requirements:
            assert re.fullmatch(r"[\w.-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", requirement)


def test_the_newest_pinned_version_is_chosen_unless_one_is_named() -> None:
    newer = replace(LOCK, version="0.33.0")
    known = [newer, LOCK, replace(LOCK, build="cuda")]
    assert install.choose(known, "vllm", "", "cpu") is newer
    assert install.choose(known, "vllm", "0.32.0", "cpu") is LOCK
    with pytest.raises(InvalidArgument, match=r"0\.33\.0, 0\.32\.0") as refusal:
        install.choose(known, "vllm", "0.1", "cpu")
    assert refusal.value.reason == "VERSION_NOT_PINNED"
    with pytest.raises(InvalidArgument) as refusal:
        install.choose(known, "causal_lm", "", "cpu")
    assert refusal.value.reason == "UNKNOWN_ENGINE"


def test_an_installed_engine_is_found_and_a_second_installation_does_nothing(tmp_path: Path) -> None:
    root, python = tmp_path / "engines", a_python(tmp_path, pip='echo "Collecting one==1.0"')

    first = make(root, python)
    again = make(root, "no such interpreter is needed")

    assert (first.new, again.new) == (True, False)
    assert any("package one" in line for line in first.lines)
    assert again.lines == []
    (found,) = installed.found(root)
    assert (found.engine, found.version, found.build) == ("vllm", "0.32.0", "cpu")
    assert found.directory == first.directory == again.directory
    assert (found.directory / "requirements.txt").read_text() == TEXT
    assert left(root) == [found.directory]


def test_another_list_of_the_same_version_leaves_the_environment_that_may_be_in_use(tmp_path: Path) -> None:
    root, python = tmp_path / "engines", a_python(tmp_path)
    first = make(root, python)
    second = make(root, python, replace(LOCK, text=TEXT + "# newer\n"))
    assert first.directory != second.directory
    assert len(installed.found(root)) == 2


def failure(root: Path, python: str, lock: Lock = LOCK, directory: Path | None = None) -> DumontError:
    with pytest.raises(DumontError) as refusal:
        make(root, python, lock, directory)
    return refusal.value


def left(root: Path) -> list[Path]:
    return [path for path in root.glob("*/*") if not path.name.endswith(".lock")]  # locks are never removed


@pytest.mark.parametrize(
    ("pip", "imports", "kind", "reason", "said"),
    [
        ("echo 'ERROR: no such package'; exit 1", "exit 0", Unavailable, "PACKAGES_UNAVAILABLE", "no such"),
        (
            "echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES torch==2.13.0'; exit 1",
            "exit 0",
            Unavailable,
            "PACKAGES_UNAVAILABLE",
            "CPU builds",
        ),
        ("exit 0", "echo 'no libx' >&2; exit 1", FailedPrecondition, "ENGINE_UNUSABLE", "no libx"),
    ],
    ids=["pip fails", "another torch", "not importable"],
)
def test_nothing_is_left_of_an_installation_that_failed(
    tmp_path: Path, pip: str, imports: str, kind: type[DumontError], reason: str, said: str
) -> None:
    root = tmp_path / "engines"
    error = failure(root, a_python(tmp_path, pip, imports))
    assert (type(error), error.reason) == (kind, reason)
    assert said in error.message
    assert left(root) == []


def test_what_an_interrupted_installation_left_is_removed_by_the_next(tmp_path: Path) -> None:
    root, python = tmp_path / "engines", a_python(tmp_path)
    place = make(root, python).directory
    # As after SIGKILL: begun, not recorded.
    (place / installed.RECORD).unlink()
    (place.parent / f".{place.name}.begun").touch()
    (place / "half").touch()
    assert installed.found(root) == []

    made = make(root, python)

    assert made.new
    assert "interrupted" in made.lines[0]
    assert not (place / "half").exists()


def test_a_directory_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "file").touch()
    error = failure(tmp_path / "engines", a_python(tmp_path / "p"), directory=directory)
    assert error.reason == "DIRECTORY_IN_USE"
    assert (directory / "file").exists()


def test_a_directory_may_be_named(tmp_path: Path) -> None:
    made = make(tmp_path / "engines", a_python(tmp_path / "p"), directory=tmp_path / "mine")
    assert made.directory == tmp_path / "mine"
    assert installed.found(tmp_path / "engines") == []
    again = failure(tmp_path / "engines", "python", replace(LOCK, text=TEXT + "# other\n"), tmp_path / "mine")
    assert again.reason == "DIRECTORY_IN_USE"


def test_the_disk_is_looked_at_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4999 + install.SPARE_BYTES))
    error = failure(tmp_path / "engines", a_python(tmp_path))
    assert (type(error), error.reason) == (ResourceExhausted, "DISK_FULL")
    assert left(tmp_path / "engines") == []


def test_a_python_or_a_machine_that_the_packages_are_not_pinned_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = failure(tmp_path / "engines", a_python(tmp_path, version="3.14"))
    assert error.reason == "ENGINE_PYTHON_UNSUPPORTED"
    assert "--python" in error.message
    assert failure(tmp_path / "engines", str(tmp_path / "absent")).reason == "ENGINE_PYTHON_UNSUPPORTED"
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert failure(tmp_path / "engines", a_python(tmp_path)).reason == "MACHINE_UNSUPPORTED"


def test_two_installations_do_not_fill_one_directory(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    with (tmp_path / ".mine.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        error = failure(tmp_path / "engines", a_python(tmp_path / "p"), directory=place)
    assert (type(error), error.reason) == (Aborted, "INSTALL_RUNNING")


def test_an_engine_whose_import_hangs_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "IMPORT_SECONDS", 0.1)
    error = failure(tmp_path / "engines", a_python(tmp_path, imports="exec sleep 60"))
    assert error.reason == "ENGINE_UNUSABLE"
    assert "more than 0.1 s" in error.message
    assert "--engine-python" in error.message
    assert left(tmp_path / "engines") == []


def test_an_installation_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    # Given one that is under way
    python = a_python(tmp_path, pip="echo Collecting one==1.0; exec sleep 100")
    environment = os.environ | {"DUMONT_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "snapshotd.engines", "install", "vllm", "--build", "cpu"]
    with subprocess.Popen(
        [*command, "--python", python], env=environment, stderr=subprocess.PIPE, text=True
    ) as installing:
        assert installing.stderr is not None
        while "package one" not in installing.stderr.readline():
            assert installing.poll() is None

        # When it is told to end
        installing.terminate()
        said = installing.stderr.read()

    # Then nothing is left of it
    assert installing.returncode == 130
    assert "interrupted" in said
    assert left(tmp_path / "engines") == []

"""pycriu is found where CRIU was installed, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A directory with bindings, and with what was made for another Python: a protobuf that cannot load."""
    for package in ("pycriu", "google", "only_there"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "google" / "protobuf.py").write_text("raise SystemError('made for another Python')")
    (tmp_path / "pycriu" / "__init__.py").write_text(
        "from google.protobuf import descriptor\nfrom . import rpc"
    )
    (tmp_path / "pycriu" / "rpc.py").write_text("here = __file__")
    return tmp_path


def python(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, in which nobody has imported protobuf or pycriu yet."""
    first = "import importlib.util, pathlib, sys; from snapshotd.system import criu_bindings; "
    first += "directory = pathlib.Path(sys.argv[1]); "
    command = [sys.executable, "-c", first + code, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_bindings_are_those_that_were_named_and_use_our_own_protobuf(distribution: Path) -> None:
    done = python("print(criu_bindings.load('pycriu', directory).rpc.here)", distribution)
    assert (done.stdout.strip(), done.stderr) == (f"{distribution}/pycriu/rpc.py", "")


def test_what_else_lies_there_is_not_found(distribution: Path) -> None:
    code = "criu_bindings.load('pycriu.rpc', directory); print(importlib.util.find_spec('only_there'))"
    assert python(code, distribution).stdout.strip() == "None"


def test_bindings_that_are_nowhere_are_an_import_error(tmp_path: Path) -> None:
    done = python("criu_bindings.load('pycriu', directory)", tmp_path)
    assert f"ImportError: {tmp_path}/pycriu/__init__.py is not there" in done.stderr


def test_bindings_that_fail_leave_nothing_half_loaded(distribution: Path) -> None:
    (distribution / "pycriu" / "rpc.py").write_text("raise ImportError('too old')")
    code = "\ntry:\n    criu_bindings.load('pycriu', directory)\nexcept ImportError as error:\n"
    code += "    print(error, 'pycriu' in sys.modules)"
    assert python(code, distribution).stdout.strip() == "too old False"

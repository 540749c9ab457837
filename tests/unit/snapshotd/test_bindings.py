"""pycriu is found where CRIU was installed, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from snapshotd.shim import bindings


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A directory with bindings, and with what was made for another Python: a protobuf that cannot load."""
    for package in ("bindings_here", "google", "only_there"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "google" / "protobuf.py").write_text("raise SystemError('made for another Python')")
    (tmp_path / "bindings_here" / "__init__.py").write_text("from google.protobuf import descriptor")
    return tmp_path


def test_the_bindings_use_our_own_protobuf(distribution: Path) -> None:
    # A process of its own, in which nobody has imported protobuf yet, like a shim that starts.
    load = "import pathlib, sys; from snapshotd.shim import bindings; "
    load += "bindings.load('bindings_here', pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", load, str(distribution)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_else_lies_there_is_not_found_afterwards(distribution: Path) -> None:
    before = list(sys.path)
    bindings.load("bindings_here", distribution)
    assert find_spec("only_there") is None
    assert sys.path == before


def test_bindings_that_are_nowhere_are_an_import_error(tmp_path: Path) -> None:
    with pytest.raises(ImportError):
        bindings.load("bindings_nowhere", tmp_path)

"""What ``import dumont`` offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dumont
from dumont import convert, errors
from dumont.connection import resolve_endpoint
from dumont.controller.v1.instance_service_pb2 import Instance
from dumont.rpc.channel import is_local
from dumont.types import Generation, StartInfo, Usage


def test_every_public_name_can_be_had() -> None:
    assert all(getattr(dumont, name) is not None for name in dumont.__all__)
    assert sorted(dumont.__all__) == dir(dumont)
    assert {error.__name__ for error in errors.ERRORS.values()} <= set(dumont.__all__)


def test_the_sources_are_what_runs_from_every_directory(tmp_path: Path) -> None:
    """An editable install that also copied them would run old code outside the repository."""
    modules = ("controller", "dumont.up", "model_host", "snapshotd")
    show = "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]))"

    found = subprocess.run(
        [sys.executable, "-c", show, *modules], cwd=tmp_path, check=True, capture_output=True, text=True
    )

    root = Path(dumont.__file__).parent.parent
    assert [str(Path(file).relative_to(root)) for file in found.stdout.split()] == [
        "controller/__init__.py", "dumont/up.py", "model_host/__init__.py", "snapshotd/__init__.py",
    ]  # fmt: skip


def test_other_names_cannot() -> None:
    with pytest.raises(AttributeError, match="no attribute 'undeploy'"):
        dumont.undeploy  # noqa: B018 - reading it is the test


def test_a_generation_prints_as_its_text() -> None:
    start = StartInfo("cold", (), (), 1.0, "instances/a", "nodes/a")
    generation = Generation("Paris.", start, Usage(1, 2), "end", 0.5)
    assert f"{generation}" == str(generation) == "Paris."


def test_the_endpoint_is_the_one_given_else_the_environments_else_the_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DUMONT_ENDPOINT", raising=False)
    assert resolve_endpoint(None) == "localhost:7070"
    monkeypatch.setenv("DUMONT_ENDPOINT", "elsewhere:1")
    assert resolve_endpoint(None) == "elsewhere:1"
    assert resolve_endpoint("here:2") == "here:2"


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [("localhost:1", True), ("127.0.0.9:1", True), ("[::1]:1", True), ("unix:/x", True),
     ("10.0.0.1:1", False), ("example.com:1", False), ("[2001:db8::1]:1", False),
     ("localhost:1,127.0.0.1:2", True), ("localhost:1,example.com:2", False)],
)  # fmt: skip
def test_only_this_machine_is_local(endpoint: str, local: bool) -> None:
    assert is_local(endpoint) is local


def test_a_value_newer_than_this_client_is_told_as_unknown() -> None:
    assert convert.word(Instance.State, 3, "STATE_") == "capturing"
    assert convert.word(Instance.State, 77, "STATE_") == "unknown-77"

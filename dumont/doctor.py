"""What this machine and its surroundings lack, and what to do about it. Needs no running service."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from dumont.errors import DumontError, services_not_installed

OLDEST_PYTHON: Final = (3, 11)
PREFLIGHT_SECONDS: Final = 120


@dataclass(frozen=True)
class Check:
    """The result of one check. If it did not pass, ``message`` says what to do.

    ``needed``: without it nothing works here.
    """

    check: str
    passed: bool
    needed: bool
    message: str


def examine(endpoint: str | None = None) -> list[Check]:
    """Run all checks; the results are in the order in which to repair what failed."""
    return [_python(), _kernel(), *_node(), *_object_store(), _models(), _endpoint(endpoint)]


def _python() -> Check:
    version = platform.python_version()
    passed = sys.version_info >= OLDEST_PYTHON
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Check(
        "python", passed, True, f"Python {version}" + ("" if passed else f"; install {oldest} or newer")
    )


def _kernel() -> Check:
    system = f"{platform.system()} {platform.release()}"
    linux = platform.system() == "Linux"
    return Check(
        "kernel",
        linux,
        False,
        system if linux else f"{system}; models run on Linux nodes, the client anywhere",
    )


def _node() -> list[Check]:
    """snapshotd's own checks of this machine; a machine with the client alone has none to pass."""
    if not find_spec("snapshotd") or not find_spec("blake3"):
        return [Check("services", False, False, services_not_installed().message)]
    return _ask("preflight", [sys.executable, "-m", "snapshotd.preflight", "--json"])


def _object_store() -> list[Check]:
    """Whether the bucket in this machine's environment supports conditional writes, which it must."""
    if not os.environ.get("DUMONT_SNAPSHOTD_STORE_URL") or not find_spec("snapshotd"):
        return []
    return _ask("object_store", [sys.executable, "-m", "snapshotd.object_store", "check"])


def _ask(check: str, command: list[str]) -> list[Check]:
    """The checks that a part of snapshotd makes, run as a program of its own."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PREFLIGHT_SECONDS, check=False)
        findings = json.loads(done.stdout)
        return [
            Check(found["check"], found["passed"], found.get("needed", True), found["message"])
            for found in findings
        ]
    except subprocess.TimeoutExpired:
        return [Check(check, False, True, f"no answer in {PREFLIGHT_SECONDS} seconds: {' '.join(command)}")]
    except (ValueError, KeyError, TypeError):
        output = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return [Check(check, False, True, f"{' '.join(command)} failed: {output}")]


def models_dir() -> Path:
    """Where this machine's models are cached."""
    if chosen := os.environ.get("DUMONT_SNAPSHOTD_MODELS_DIR"):
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dumont"
    return Path(os.environ.get("DUMONT_CACHE") or cache) / "models"


def _models() -> Check:
    directory = models_dir()
    count = len(list(directory.glob("*/*/config.json")))
    remedy = "none yet; a model is downloaded when it is first deployed, or deploy a directory"
    return Check("models", count > 0, False, f"{directory}: {count or remedy}")


def _endpoint(endpoint: str | None) -> Check:
    from dumont.sync import Client

    with Client(endpoint) as client:
        try:
            nodes = client.nodes.list()
        except DumontError as error:
            return Check("controller", False, False, error.message)
        ready = sum(node.state == "ready" for node in nodes)
        message = f"{client.endpoint} answers; {ready} of {len(nodes)} nodes ready"
        return Check(
            "controller", ready > 0, False, message if ready else f"{message}; start snapshotd on one"
        )

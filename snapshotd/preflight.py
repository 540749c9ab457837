"""Check what this machine can do. ``python -m snapshotd.preflight`` prints the findings."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dumont.engines import INSTALLED
from dumont.errors import FailedPrecondition, InvalidArgument
from snapshotd.engines import environment, installed
from snapshotd.gpu import sharing as gpu_sharing
from snapshotd.model import Finding
from snapshotd.system.paths import DRIVER_VERSION, cache_directory, engines_directory

OLDEST_CRIU = (4, 0)
OLDEST_DRIVER = 570
# The environment's form of --engine-python.
ENGINE_PYTHON = "DUMONT_SNAPSHOTD_ENGINE_PYTHON"
ARCHITECTURES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Criu:
    """A CRIU that works on this machine.

    Attributes:
        binary: the program.
        pycriu: directory from which pycriu is imported; None if it is on Python's path.
    """

    binary: Path
    pycriu: Path | None
    version: str


def find_criu() -> tuple[Criu | None, list[Finding]]:
    """The first CRIU that is new enough and passes its own check, and the findings.

    Candidates in order: ``$DUMONT_CRIU``, ``criu`` on the PATH, and the one that scripts/setup has unpacked.
    """
    candidates = [Path(os.environ["DUMONT_CRIU"])] if os.environ.get("DUMONT_CRIU") else []
    candidates += [Path(folder) / "criu" for folder in os.get_exec_path()]
    candidates.append(cache_directory() / "criu" / "bin" / "criu")
    problem = "there is no criu; run scripts/setup, or set DUMONT_CRIU to its path"
    for binary in candidates:
        if not binary.is_file():
            continue
        version = _criu_version(binary)
        if version is None or tuple(map(int, version.split(".")[:2])) < OLDEST_CRIU:
            problem = (
                f"{binary} is CRIU {version or '?'}, and 4.0 is the oldest that works; run scripts/setup"
            )
            continue
        pycriu = find_pycriu(binary)
        if pycriu is None:
            problem = f"{binary} has no pycriu beside it; install python3-pycriu or run scripts/setup"
            continue
        if failure := _criu_check(binary):
            problem = f"'{binary} check' fails, so this kernel or container cannot checkpoint: {failure}"
            continue
        found = Criu(binary, pycriu if pycriu != Path() else None, version)
        return found, [Finding("criu", True, f"CRIU {version} at {binary} passes its check")]
    return None, [Finding("criu", False, problem)]


def _criu_check(binary: Path) -> str:
    """Why CRIU cannot work here, by the last line of its check; empty if it can."""
    try:
        checked = subprocess.run([binary, "check"], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "it gave no answer within 30 s"
    return "" if checked.returncode == 0 else (checked.stderr.strip().splitlines() or ["no reason given"])[-1]


def _criu_version(binary: Path) -> str | None:
    try:
        said = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"Version: (\d+\.\d+(?:\.\d+)?)", said)
    return found.group(1) if found else None


def find_pycriu(binary: Path) -> Path | None:
    """The directory that holds pycriu; ``Path()`` if it is on Python's path, None if there is none."""
    prefix = binary.resolve().parent.parent
    if (prefix / "pycriu" / "__init__.py").exists():
        return prefix
    if importlib.util.find_spec("pycriu") is not None:
        return Path()
    distribution = Path("/usr/lib/python3/dist-packages")
    return distribution if (distribution / "pycriu").is_dir() else None


def check_machine(gpu: bool = True) -> list[Finding]:
    """Everything but CRIU; ``gpu``: the driver too."""
    architecture = platform.machine()
    return [
        Finding(
            "root",
            os.geteuid() == 0,
            "running as root"
            if os.geteuid() == 0
            else "not root; namespaces and CRIU need it, so run with sudo",
        ),
        Finding(
            "architecture",
            architecture in ARCHITECTURES,
            f"{architecture}"
            if architecture in ARCHITECTURES
            else f"{architecture} is not one of {ARCHITECTURES}",
        ),
        _check_cgroup(),
        _check_memory_limit(),
        *([_check_gpu(), *_check_sharing()] if gpu else []),
    ]


def _check_cgroup() -> Finding:
    from snapshotd.system.freezer import cgroup2_root

    root = cgroup2_root()
    if root is not None and os.access(root, os.W_OK):
        return Finding("cgroup2", True, f"instances are parked by cgroup freeze at {root}")
    return Finding("cgroup2", True, "no writable cgroup v2; instances are parked by SIGSTOP instead")


def _check_memory_limit() -> Finding:
    from snapshotd.system.memory_limit import version

    found = version()
    if found:
        return Finding("memory_limit", True, f"the memory of a model host is limited by cgroup v{found}")
    return Finding(
        "memory_limit",
        True,
        "no cgroup can limit memory here; when the node has none left, the kernel ends model hosts first",
    )


def driver_problem(driver: str) -> str:
    """Why this version of the NVIDIA driver cannot suspend processes; empty if it can."""
    if int(driver.split(".")[0]) >= OLDEST_DRIVER:
        return ""
    return (
        f"NVIDIA driver {driver} cannot checkpoint processes, and {OLDEST_DRIVER} is the oldest that can; "
        "update the driver"
    )


def _check_gpu() -> Finding:
    if not DRIVER_VERSION.exists():
        return Finding("gpu", True, "no NVIDIA driver; models run on the CPU")
    driver = DRIVER_VERSION.read_text().strip()
    problem = driver_problem(driver)
    if not problem and importlib.util.find_spec("pynvml") is None:
        problem = "nvidia-ml-py is not installed, so its GPUs are not known; install 'dumont-services[gpu]'"
    if problem:
        # Models run on the GPUs all the same, and start cold.
        return Finding("gpu", False, f"{problem}; until then models start cold on GPUs", needed=False)
    return Finding("gpu", True, f"NVIDIA driver {driver}")


def _check_sharing() -> list[Finding]:
    """MIG and MPS. Models run beside them; only captures, parks and restores are refused."""
    nvml = open_nvml()
    if nvml is None:
        return []
    return [
        Finding(f"gpu_{sharing.kind.lower()}", False, sharing.message, needed=False)
        for sharing in gpu_sharing.found(nvml)
    ]


def open_nvml() -> Any:
    """``pynvml``, initialised; None if there is no NVIDIA driver or no NVML package."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def check_engines() -> list[Finding]:
    """The engines that run under an interpreter of their own. None of them is needed."""
    named = os.environ.get(ENGINE_PYTHON, "")
    try:
        pythons = environment.parse_interpreters(named)
    except InvalidArgument as error:
        return [Finding("engines", False, f"{ENGINE_PYTHON}: {error.message}", needed=False)]
    ours = installed.used(installed.found(engines_directory()))
    return [
        _check_engine(name, pythons.get(name) or (ours[name].python if name in ours else None))
        for name in sorted(INSTALLED)
    ]


def _check_engine(name: str, python: Path | None) -> Finding:
    check = f"engine_{name}"
    if python is None:
        return Finding(check, False, f"not installed; 'dumont engine install {name}' makes it", needed=False)
    try:
        engine = environment.examine(name, python)
    except FailedPrecondition as error:
        return Finding(check, False, error.message, needed=False)
    return Finding(check, True, f"{name} {engine.version} at {python}", needed=False)


def findings() -> list[Finding]:
    """The findings of all checks."""
    return [*check_machine(), *find_criu()[1], *check_engines()]


def problems(found: Iterable[Finding]) -> list[str]:
    """Why no model host can run here; empty if they can."""
    return [finding.message for finding in found if finding.needed and not finding.passed]


def main() -> None:
    """The command ``python -m snapshotd.preflight``."""
    parser = argparse.ArgumentParser(description="Check whether this machine can run snapshotd.")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--criu", action="store_true", help="print only the path of the CRIU that is used")
    arguments = parser.parse_args()
    if arguments.criu:
        criu, reasons = find_criu()
        if criu is None:
            raise SystemExit("; ".join(finding.message for finding in reasons))
        sys.stdout.write(f"{criu.binary}\n")
        return
    found = findings()
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found]) + "\n")
    else:
        for finding in found:
            mark = "ok  " if finding.passed else "MISS" if finding.needed else "note"
            sys.stdout.write(f"{mark} {finding.check}: {finding.message}\n")
    raise SystemExit(1 if problems(found) else 0)


if __name__ == "__main__":
    main()

"""The facts of this node that must be the same where a snapshot is restored."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from blake3 import blake3

from snapshotd.compatibility import LAYOUT_VERSION

# Packages that a model host has loaded. A restored process maps their files again and must find them
# unchanged.
LIBRARIES = ("grpcio", "numpy", "protobuf", "safetensors", "tokenizers", "torch", "transformers")


def node_facts(criu_version: str) -> dict[str, str]:
    """The facts by name, as every manifest records them."""
    return {
        "architecture": platform.machine(),
        "cpu_features": cpu_features(Path("/proc/cpuinfo").read_text()),
        "criu": criu_version,
        "dumont": _version("dumont"),
        "image_layout": LAYOUT_VERSION,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: _version(package) for package in LIBRARIES},
    }


def cpu_features(cpuinfo: str) -> str:
    """A digest of the CPU's feature flags, by which libraries choose their code when they are loaded."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return blake3(" ".join(sorted(value.split())).encode()).hexdigest()[:16]
    return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"

"""Where things are on a node."""

from __future__ import annotations

import os
from pathlib import Path

# There if the NVIDIA driver is loaded; its version.
DRIVER_VERSION = Path("/sys/module/nvidia/version")


def cache_directory() -> Path:
    """Where scripts/setup puts its downloads."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("DUMONT_CACHE") or Path(base) / "dumont")


def engines_directory() -> Path:
    """Where ``dumont engine install`` makes environments."""
    return cache_directory() / "engines"

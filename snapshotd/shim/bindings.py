"""CRIU's Python bindings, wherever CRIU was installed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def load(module: str, directory: Path | None) -> Any:
    """Import ``pycriu`` or a module of it.

    Args:
        directory: that holds the package; None: it is on Python's path. A distribution's directory holds
            other packages as well, made for the distribution's own Python: protobuf, for one. They are
            looked at after our own, and never again once this returns.

    Raises:
        ImportError: it is not there, or fails.
    """
    place = str(directory)
    if directory is None or place in sys.path:
        return import_module(module)
    # Else a package "google" over there would be found first: ours has no file of its own.
    import_module("google.protobuf")
    sys.path.append(place)
    try:
        return import_module(module)
    finally:
        sys.path.remove(place)

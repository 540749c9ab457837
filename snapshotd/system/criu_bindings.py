"""CRIU's Python bindings, wherever CRIU was installed."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = "pycriu"


def load(module: str, directory: Path | None) -> Any:
    """Import ``pycriu`` or a module of it, once for this process.

    Args:
        directory: holds the package; None if it is on Python's path. A distribution's directory also holds
            packages for the distribution's own Python, such as protobuf, so it is never put on the path.

    Raises:
        ImportError: the package is not there, or its import fails.
    """
    if directory is not None and PACKAGE not in sys.modules:
        _load_package(directory / PACKAGE / "__init__.py")
    return import_module(module)


def _load_package(file: Path) -> None:
    spec = spec_from_file_location(PACKAGE, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"{file} is not there")
    sys.modules[PACKAGE] = package = module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[PACKAGE]
        raise

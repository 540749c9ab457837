"""The versions that a snapshot of this process depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version


def library_versions() -> dict[str, str]:
    """Version by name: Python and what computes."""
    names = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "grpcio", "protobuf")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}

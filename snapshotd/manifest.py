"""The manifest as bytes: how it is written and read, and what it may contain."""

from __future__ import annotations

import json
import re

from blake3 import blake3
from pydantic import TypeAdapter, ValidationError

from dumont.errors import DataLoss
from snapshotd.model import Manifest

NAME = "manifest.json"
VERSION = 1
LARGEST = 1 << 20
MOST_FILES = 10_000
LARGEST_FILE = 1 << 44

_ADAPTER = TypeAdapter(Manifest)
# The characters that CRIU's file names consist of. A name cannot lead out of the directory.
_FILE_NAME = re.compile(r"[a-z0-9][A-Za-z0-9._-]{0,127}")


def encode(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file."""
    document = {"version": VERSION, "manifest": _ADAPTER.dump_python(manifest, mode="json")}
    return json.dumps(document, sort_keys=True, indent=1, allow_nan=False).encode()


def digest(data: bytes) -> str:
    """BLAKE3 of the encoded manifest, in hex. It identifies the snapshot's content."""
    return blake3(data).hexdigest()


def decode(data: bytes) -> Manifest:
    """Read what :func:`encode` wrote.

    Raises:
        DataLoss: MANIFEST_DAMAGED, it is no manifest, has another version, or contains impossible values.
    """
    if len(data) > LARGEST:
        raise _damaged(f"it has {len(data)} bytes, more than the {LARGEST} allowed")
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise _damaged("its version is not 1")
        manifest = _ADAPTER.validate_json(json.dumps(document.get("manifest")))
    except (ValueError, RecursionError, ValidationError) as error:
        raise _damaged(str(error).splitlines()[0]) from error
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    if not 0 < len(manifest.files) <= MOST_FILES:
        raise _damaged(f"it names {len(manifest.files)} files")
    seen: set[str] = set()
    for file in manifest.files:
        if not _FILE_NAME.fullmatch(file.name) or file.name == NAME:
            raise _damaged(f"the file name {file.name[:80]!r} is not allowed")
        if file.name.lower() in seen:
            raise _damaged(f"the file name {file.name!r} occurs twice")
        if not 0 <= file.size <= LARGEST_FILE or not re.fullmatch(r"[0-9a-f]{64}", file.digest):
            raise _damaged(f"the size or the digest of {file.name} is impossible")
        seen.add(file.name.lower())
    for name, digest in manifest.weight_files.items():
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise _damaged(f"the digest of the weight file {name[:80]!r} is impossible")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not allowed")


def _damaged(why: str) -> DataLoss:
    return DataLoss("MANIFEST_DAMAGED", f"the manifest cannot be read: {why}")

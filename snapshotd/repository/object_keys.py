"""The keys of the objects in a repository, which are the same in a directory and in a bucket."""

from __future__ import annotations

import re

CHUNKS = "chunks/"
# The version of the packing of chunks, so that a chunk packed in an older way is not taken for a current one.
PACKING = "v2"
SNAPSHOTS = "snapshots/"
DELETED = "deleted/"
DAMAGED = "damaged/"
# Objects that are being written. Those that a killed writer left are garbage once they are old.
TEMPORARY = "tmp/"

_MANIFEST = re.compile(r"snapshots/([a-z][a-z0-9-]{0,62})/manifest")


def chunk_key(chunk: str) -> str:
    """The key of a chunk."""
    return f"{CHUNKS}{PACKING}/{chunk[:2]}/{chunk}"


def damage_key(chunk: str) -> str:
    """The key of the mark that says that a chunk is damaged."""
    return f"{DAMAGED}{chunk}"


def chunk_of(key: str) -> str:
    """The chunk that a key below ``chunks/`` or ``damaged/`` belongs to.

    Empty for a chunk of another packing, which no manifest of this version names; it is garbage once it is
    old.
    """
    chunk = key.rpartition("/")[2]
    return chunk if key in (chunk_key(chunk), damage_key(chunk)) else ""


def manifest_key(snapshot: str) -> str:
    """The key of a snapshot's manifest."""
    return f"{SNAPSHOTS}{snapshot}/manifest"


def snapshot_of(key: str) -> str | None:
    """The snapshot whose manifest has this key; None if the key is not that of a manifest."""
    found = _MANIFEST.fullmatch(key)
    return found and found[1]


def tombstone_key(snapshot: str, digest: str) -> str:
    """The key of the tombstone of a deleted snapshot, whose document has this digest."""
    return f"{DELETED}{snapshot}/{digest}"

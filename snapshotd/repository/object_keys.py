"""Where things lie in the store: the same keys in a directory and in a bucket."""

from __future__ import annotations

import re

CHUNKS = "chunks/"
# Counts the ways in which chunks were packed: one packed in another way is not taken for this one.
PACKING = "v2"
SNAPSHOTS = "snapshots/"
DELETED = "deleted/"
DAMAGED = "damaged/"
# What is being written; what a killed writer left here is garbage once it is old.
TEMPORARY = "tmp/"

_MANIFEST = re.compile(r"snapshots/([a-z][a-z0-9-]{0,62})/manifest")


def chunk_key(chunk: str) -> str:
    return f"{CHUNKS}{PACKING}/{chunk[:2]}/{chunk}"


def damage_key(chunk: str) -> str:
    return f"{DAMAGED}{chunk}"


def chunk_of(key: str) -> str:
    """The chunk that a key under ``chunks/`` or ``damaged/`` is of.

    Empty when it is packed in a way that no manifest of this version counts on: garbage once it is old.
    """
    chunk = key.rpartition("/")[2]
    return chunk if key in (chunk_key(chunk), damage_key(chunk)) else ""


def manifest_key(snapshot: str) -> str:
    return f"{SNAPSHOTS}{snapshot}/manifest"


def snapshot_of(key: str) -> str | None:
    """The snapshot whose manifest a key is; None: it is something else."""
    found = _MANIFEST.fullmatch(key)
    return found and found[1]


def tombstone_key(snapshot: str, digest: str) -> str:
    return f"{DELETED}{snapshot}/{digest}"

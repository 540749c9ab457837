"""The published manifest: one signed line, then the document that it signs.

``dumont-snapshot 1 <signer> <signature>\\n`` and canonical JSON. The signature covers the bytes as they
are, so nothing is parsed before it is known who wrote it.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from blake3 import blake3

from dumont.errors import DataLoss, InvalidArgument
from dumont.names import check_id
from snapshotd import manifest as manifests
from snapshotd.model import Manifest
from snapshotd.store.chunking import pieces_of
from snapshotd.store.model import PublishedFile, PublishedSnapshot, Run, SealedKey
from snapshotd.store.signing import Signer, TrustedKeys

VERSION = 1
LARGEST = 32 << 20
# 1 TiB of chunks; a file's holes are counted, never listed.
MOST_CHUNKS = 1 << 18
MOST_RUNS = 1 << 18

_HEAD = re.compile(rb"dumont-snapshot 1 ([0-9a-f]{32}) ([0-9a-f]{128})\n")
_CHUNK = re.compile(r"[0-9a-f]{64}")


def encode(
    manifest: Manifest, files: tuple[PublishedFile, ...], key: SealedKey | None, signer: Signer
) -> tuple[bytes, PublishedSnapshot]:
    """The object to publish, and what reading it back will give.

    Raises:
        InvalidArgument: the snapshot is larger than a manifest can describe.
    """
    document = {
        "version": VERSION,
        "manifest": json.loads(manifests.encode(manifest)),
        "files": [{"name": file.name, "size": file.size, "runs": _encode_runs(file)} for file in files],
        "encryption": None
        if key is None
        else {"key_id": key.key_id, "wrapped": base64.b64encode(key.wrapped).decode()},
        "signer": signer.key_id,
    }
    body = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > LARGEST or sum(len(run.chunks) for file in files for run in file.runs) > MOST_CHUNKS:
        raise InvalidArgument(
            "SNAPSHOT_TOO_LARGE", f"snapshots/{manifest.id} has more chunks than a manifest may name"
        )
    data = f"dumont-snapshot 1 {signer.key_id} {signer.sign(body).hex()}\n".encode() + body
    return data, PublishedSnapshot(manifest, files, digest(body), signer.key_id, key)


def digest(body: bytes) -> str:
    return blake3(body).hexdigest()


def decode(data: bytes, snapshot: str, trusted: TrustedKeys) -> PublishedSnapshot:
    """Read and verify what :func:`encode` wrote.

    Args:
        snapshot: the id it was found under.

    Raises:
        PermissionDenied: it is signed by a key that is not trusted.
        DataLoss: it is damaged, of another snapshot, or says something that cannot be true.
    """
    signer, signature, body = _split(data)
    trusted.verify(signer, body, signature)
    published = _parse(body, signer)
    if published.manifest.id != snapshot:
        raise DataLoss(
            "MANIFEST_MISPLACED",
            f"the manifest found as snapshots/{snapshot} is that of snapshots/{published.manifest.id}",
            metadata={"snapshot": snapshot},
        )
    return published


def named_chunks(data: bytes) -> frozenset[str]:
    """The chunks that a document names, whoever signed it: what garbage collection must keep.

    Raises:
        DataLoss: it cannot be read.
    """
    signer, _, body = _split(data)
    return _parse(body, signer).chunks()


def _split(data: bytes) -> tuple[str, bytes, bytes]:
    if len(data) > LARGEST + 256:
        raise _damaged(f"it has {len(data)} bytes")
    head = _HEAD.match(data)
    if head is None:
        raise _damaged("its first line is not that of a signed manifest of version 1")
    return head[1].decode(), bytes.fromhex(head[2].decode()), data[head.end() :]


def _parse(body: bytes, signer: str) -> PublishedSnapshot:
    try:
        document = json.loads(body, parse_constant=_refuse_constant)
        if document["version"] != VERSION or document["signer"] != signer:
            raise _damaged("its version or its signer is not as its first line says")
        manifest = manifests.decode(json.dumps(document["manifest"]).encode())
        check_id(manifest.id, "id")
        files = _parse_files(document["files"], manifest)
        key = _parse_key(document["encryption"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InvalidArgument) as error:
        raise _damaged(str(error).splitlines()[0][:200] if str(error) else "it is malformed") from error
    return PublishedSnapshot(manifest, files, digest(body), signer, key)


def _parse_files(listed: Any, manifest: Manifest) -> tuple[PublishedFile, ...]:
    described = [(file.name, file.size) for file in manifest.files]
    if [(file["name"], file["size"]) for file in listed] != described:
        raise _damaged("its runs are of other files than it describes")
    if sum(len(file["runs"]) for file in listed) > MOST_RUNS:
        raise _damaged("it has too many runs")
    files = tuple(
        PublishedFile(name, size, tuple(map(_parse_run, file["runs"])))
        for (name, size), file in zip(described, listed, strict=True)
    )
    for file in files:
        if sum(run.pieces for run in file.runs) != pieces_of(file.size):
            raise _damaged(f"the runs of {file.name} do not make up its size")
    if sum(len(run.chunks) for file in files for run in file.runs) > MOST_CHUNKS:
        raise _damaged("it has too many chunks")
    return files


def _encode_runs(file: PublishedFile) -> list[int | list[str]]:
    """A hole is its number of pieces, a run of chunks the list of their names."""
    return [list(run.chunks) if run.chunks else run.pieces for run in file.runs]


def _parse_run(run: Any) -> Run:
    if isinstance(run, list) and run:
        if not all(isinstance(chunk, str) and _CHUNK.fullmatch(chunk) for chunk in run):
            raise _damaged("the name of a chunk is impossible")
        return Run(len(run), tuple(run))
    if type(run) is not int or not 0 < run <= pieces_of(manifests.LARGEST_FILE):
        raise _damaged("a run is impossible")
    return Run(run)


def _parse_key(encryption: Any) -> SealedKey | None:
    if encryption is None:
        return None
    wrapped = base64.b64decode(encryption["wrapped"], validate=True)
    if not isinstance(encryption["key_id"], str) or not 0 < len(encryption["key_id"]) <= 256:
        raise _damaged("the id of its key is impossible")
    return SealedKey(encryption["key_id"], wrapped)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not allowed")


def _damaged(why: str) -> DataLoss:
    return DataLoss("MANIFEST_DAMAGED", f"the published manifest cannot be read: {why}")

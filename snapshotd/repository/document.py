"""The published manifest: a line with a signature, then the document that is signed.

The line is ``dumont-snapshot 2 <signer> <signature>\\n``, and the document is canonical JSON. The signature
covers the bytes as they are, so nothing but the version is parsed before the signer is known. ``chunks``
lists the names and plain sizes of chunks. ``files`` describes each file by its extents: a hole by its size,
and a part of a chunk by ``[index, start, size]``.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from dumont.errors import DataLoss, InvalidArgument
from dumont.names import check_id
from snapshotd import manifest as manifests
from snapshotd.model import Manifest
from snapshotd.repository.model import CHUNK, Extent, PublishedFile, PublishedSnapshot, WrappedKey
from snapshotd.repository.ports import Trust
from snapshotd.repository.signing import Signer

VERSION = 2
LARGEST = 32 << 20
# 1 TiB of chunks.
MOST_CHUNKS = 1 << 17
MOST_EXTENTS = 1 << 20

_KIND = re.compile(rb"dumont-snapshot ([0-9]{1,9}) ")
_HEAD = re.compile(_KIND.pattern + rb"([0-9a-f]{32}) ([0-9a-f]{128})\n")
_CHUNK = re.compile(r"[0-9a-f]{64}")


def encode(
    manifest: Manifest, files: tuple[PublishedFile, ...], key: WrappedKey | None, signer: Signer
) -> tuple[bytes, PublishedSnapshot]:
    """Encode the manifest to publish.

    Returns:
        The bytes of the object, and what :func:`decode` makes of them.

    Raises:
        InvalidArgument: SNAPSHOT_TOO_LARGE, a manifest cannot describe so large a snapshot.
    """
    sizes = {piece.chunk: piece.chunk_size for file in files for piece in file.pieces()}
    places = {chunk: index for index, chunk in enumerate(sizes)}
    document = {
        "version": VERSION,
        "manifest": json.loads(manifests.encode(manifest)),
        "chunks": list(sizes.items()),
        "files": [
            {"name": file.name, "size": file.size, "extents": _encode_extents(file, places)} for file in files
        ],
        "encryption": None
        if key is None
        else {"key_id": key.key_id, "wrapped": base64.b64encode(key.wrapped).decode()},
        "signer": signer.key_id,
    }
    body = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    extents = sum(len(file.extents) for file in files)
    if len(body) > LARGEST or len(sizes) > MOST_CHUNKS or extents > MOST_EXTENTS:
        raise InvalidArgument(
            "SNAPSHOT_TOO_LARGE", f"snapshots/{manifest.id} has more chunks than a manifest can name"
        )
    data = f"dumont-snapshot {VERSION} {signer.key_id} {signer.sign(body).hex()}\n".encode() + body
    return data, PublishedSnapshot(manifest, files, digest(body), signer.key_id, key)


def digest(body: bytes) -> str:
    """BLAKE3 of a document, in hex."""
    return blake3(body).hexdigest()


def decode(data: bytes, snapshot: str, trusted: Trust) -> PublishedSnapshot:
    """Read and verify what :func:`encode` wrote.

    Args:
        snapshot: the id under which it was found.

    Raises:
        PermissionDenied: it is signed by a key that is not trusted.
        DataLoss: it is damaged, of another snapshot or version, or contains impossible values.
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
    """The chunks that a document names, whoever signed it, which a prune must keep.

    Raises:
        DataLoss: it cannot be read, or is of another version.
    """
    signer, _, body = _split(data)
    return _parse(body, signer).chunks()


def _split(data: bytes) -> tuple[str, bytes, bytes]:
    if len(data) > LARGEST + 256:
        raise _damaged(f"it has {len(data)} bytes")
    kind, head = _KIND.match(data), _HEAD.match(data)
    # Checked first, whoever signed it, because the rest of the line may differ in another version.
    if kind is not None and int(kind[1]) != VERSION:
        raise DataLoss(
            "MANIFEST_VERSION",
            f"the published manifest has version {int(kind[1])}, and this snapshotd reads version {VERSION}; "
            "use a snapshotd that reads it, or delete the snapshot and capture it again",
            metadata={"version": str(int(kind[1]))},
        )
    if head is None:
        raise _damaged("its first line is not a signature")
    return head[2].decode(), bytes.fromhex(head[3].decode()), data[head.end() :]


def _parse(body: bytes, signer: str) -> PublishedSnapshot:
    try:
        document = json.loads(body, parse_constant=_refuse_constant)
        if document["version"] != VERSION or document["signer"] != signer:
            raise _damaged("its version or signer differs from its first line")
        manifest = manifests.decode(json.dumps(document["manifest"]).encode())
        check_id(manifest.id, "id")
        files = _parse_files(document["files"], _parse_chunks(document["chunks"]), manifest)
        key = _parse_key(document["encryption"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InvalidArgument) as error:
        raise _damaged(str(error).splitlines()[0][:200] if str(error) else "it is malformed") from error
    return PublishedSnapshot(manifest, files, digest(body), signer, key)


def _parse_chunks(listed: Any) -> list[tuple[str, int]]:
    if not isinstance(listed, list) or len(listed) > MOST_CHUNKS:
        raise _damaged("it has too many chunks")
    for name, size in listed:
        if not isinstance(name, str) or not _CHUNK.fullmatch(name):
            raise _damaged("the name of a chunk is impossible")
        if type(size) is not int or not 0 < size <= CHUNK:
            raise _damaged("the size of a chunk is impossible")
    if len({name for name, _ in listed}) != len(listed):
        raise _damaged("a chunk is listed twice")
    return [(name, size) for name, size in listed]


def _parse_files(listed: Any, chunks: list[tuple[str, int]], manifest: Manifest) -> tuple[PublishedFile, ...]:
    described = [(file.name, file.size) for file in manifest.files]
    if [(file["name"], file["size"]) for file in listed] != described:
        raise _damaged("its extents belong to other files than it describes")
    if sum(len(file["extents"]) for file in listed) > MOST_EXTENTS:
        raise _damaged("it has too many extents")
    files = tuple(
        PublishedFile(name, tuple(_parse_extent(extent, chunks) for extent in file["extents"]))
        for (name, _), file in zip(described, listed, strict=True)
    )
    for file, (_, size) in zip(files, described, strict=True):
        if file.size != size:
            raise _damaged(f"the extents of {file.name} do not add up to its size")
    if len({piece.chunk for file in files for piece in file.pieces()}) != len(chunks):
        raise _damaged("it lists chunks that no file contains")
    return files


def _encode_extents(file: PublishedFile, places: Mapping[str, int]) -> list[int | list[int]]:
    return [
        [places[extent.chunk], extent.start, extent.size] if extent.chunk else extent.size
        for extent in file.extents
    ]


def _parse_extent(extent: Any, chunks: list[tuple[str, int]]) -> Extent:
    if type(extent) is int:
        if not 0 < extent <= manifests.LARGEST_FILE:
            raise _damaged("a hole is impossible")
        return Extent(extent)
    index, start, size = extent
    if not all(type(number) is int for number in extent) or not 0 <= index < len(chunks):
        raise _damaged("an extent is impossible")
    name, whole = chunks[index]
    if start < 0 or size <= 0 or start + size > whole:
        raise _damaged("an extent is not within its chunk")
    return Extent(size, name, start, whole)


def _parse_key(encryption: Any) -> WrappedKey | None:
    if encryption is None:
        return None
    wrapped = base64.b64decode(encryption["wrapped"], validate=True)
    if not isinstance(encryption["key_id"], str) or not 0 < len(encryption["key_id"]) <= 256:
        raise _damaged("the id of its key is impossible")
    return WrappedKey(encryption["key_id"], wrapped)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not allowed")


def _damaged(why: str) -> DataLoss:
    return DataLoss("MANIFEST_DAMAGED", f"the published manifest cannot be read: {why}")

"""A chunk as it is stored: compressed if that helps, encrypted if there is a key.

The first byte tells how the rest is packed. A compressed rest begins with its length. With a key, all of this
is encrypted with AES-256-GCM behind a random nonce. The snapshot and the chunk's name are associated data, so
that a chunk can be decrypted only where it belongs.
"""

from __future__ import annotations

import mmap
import os
import threading

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dumont.errors import DataLoss
from snapshotd.repository.chunking import name_chunk
from snapshotd.repository.ports import BytesLike

# 1 was a compressed rest without its length; see ``object_keys.PACKING``.
RAW, ZSTD = 0, 2
LEVEL = 1
LENGTH = 4
# The window of a frame is no larger than its chunk, so a frame that needs a larger one is not ours.
LARGEST_WINDOW = 8 << 20
NONCE = 12
TAG = 16
# The most bytes by which a stored chunk exceeds the plain one.
OVERHEAD = 1 + LENGTH + NONCE + TAG
DATA_KEY = 32


class _Contexts(threading.local):
    """The compressors and the buffer of a thread. Compressors cannot be shared, and new memory is slow."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self.buffer: mmap.mmap | None = None

    def buffer_for(self, size: int) -> memoryview:
        """Memory for ``size`` bytes, which the next call may return again."""
        if self.buffer is None or len(self.buffer) < size:
            # Unlike a bytearray, it is not zeroed while the interpreter's lock is held.
            self.buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memoryview(self.buffer)[:size]


class Codec:
    """Packs and unpacks the chunks of one snapshot.

    Args:
        snapshot: the snapshot's id.
        data_key: 32 bytes; None if the chunks are not encrypted.
    """

    def __init__(self, snapshot: str, data_key: bytes | None) -> None:
        self.snapshot = snapshot
        self._contexts = _Contexts()
        self._cipher = None if data_key is None else AESGCM(data_key)
        self._name_key = (
            None
            if data_key is None
            else blake3(data_key, derive_key_context="dumont v1 chunk names").digest()
        )

    def name(self, plain: BytesLike) -> str:
        """The name of a chunk with these plain bytes."""
        return name_chunk(plain, self._name_key)

    def pack(self, name: str, plain: BytesLike) -> bytes:
        """A chunk as it is stored. Packing takes memory of twice its size."""
        stored = self._frame(plain)
        if self._cipher is not None:
            nonce = os.urandom(NONCE)
            # Assigned to one name, so that there are never more than two copies.
            stored = self._cipher.encrypt(nonce, stored, self._bound(name))
            stored = nonce + stored
        return stored

    def _frame(self, plain: BytesLike) -> bytes:
        packed = self._contexts.compressor.compress(plain)
        if LENGTH + len(packed) < len(plain):
            return bytes([ZSTD]) + len(packed).to_bytes(LENGTH, "little") + packed
        return bytes([RAW]) + plain

    def open(self, name: str, stored: BytesLike, size: int, into: memoryview | None = None) -> memoryview:
        """The plain bytes of a chunk, verified.

        Args:
            size: plain bytes that it must have; no more are ever unpacked.
            into: memory of that size to unpack into; None for a buffer of this thread, which its next call
                may overwrite. A chunk that is stored uncompressed is returned where it is.

        Raises:
            DataLoss: CHUNK_DAMAGED, it is not the chunk of that name and size. ``into`` may contain anything.
        """
        framed = memoryview(stored if self._cipher is None else self._decrypt(name, stored))
        method = framed[0] if framed else -1
        if method == ZSTD:
            plain = self._decompress(name, framed[1:], size, into)
        elif method == RAW:
            plain = framed[1:]
        else:
            raise damaged(name, "it is packed in an unknown way")
        if len(plain) != size:
            raise damaged(name, f"it has {len(plain)} bytes instead of {size}")
        if self.name(plain) != name:
            raise damaged(name, "its bytes are not those that were stored")
        return plain

    def _decrypt(self, name: str, stored: BytesLike) -> bytes:
        assert self._cipher is not None
        try:
            return self._cipher.decrypt(stored[:NONCE], memoryview(stored)[NONCE:], self._bound(name))
        except (InvalidTag, ValueError):
            raise damaged(name, "it cannot be decrypted with this snapshot's key") from None

    def _decompress(self, name: str, framed: memoryview, size: int, into: memoryview | None) -> memoryview:
        packed = framed[LENGTH:]
        if len(packed) != int.from_bytes(framed[:LENGTH], "little"):
            raise damaged(name, "its compressed bytes do not end where they should")
        plain = self._contexts.buffer_for(size) if into is None else into
        reader = self._contexts.decompressor.stream_reader(packed)
        try:
            count = reader.readinto(plain)
            # One more byte shows that a chunk is too large; the rest is never unpacked.
            larger = count == size and reader.read(1)
        except zstandard.ZstdError as error:
            raise damaged(name, f"it cannot be decompressed: {error}") from None
        if larger:
            raise damaged(name, f"it unpacks to more than {size} bytes")
        return plain[:count]

    def _bound(self, name: str) -> bytes:
        return b"dumont chunk v1\0" + self.snapshot.encode() + b"\0" + name.encode()


def damaged(chunk: str, why: str) -> DataLoss:
    """The error for a chunk that cannot be unpacked."""
    return DataLoss("CHUNK_DAMAGED", f"chunk {chunk[:16]}… is damaged: {why}", metadata={"chunk": chunk})

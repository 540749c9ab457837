"""A chunk as it lies in the store: compressed if that helps, encrypted if there is a key.

The first byte says how the rest is packed; a compressed rest begins with its own length. With a key, a random
nonce and AES-256-GCM are around that; the snapshot and the chunk's name are bound as associated data, so a
chunk opens only where it belongs.
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

# 1 was a compressed rest without its length; see ``layout.chunk_key``.
RAW, ZSTD = 0, 2
LEVEL = 1
LENGTH = 4
# The window of a chunk is no larger than the chunk; a frame that wants more is none of ours.
LARGEST_WINDOW = 8 << 20
NONCE = 12
TAG = 16
# Stored bytes never exceed the plain ones by more.
OVERHEAD = 1 + LENGTH + NONCE + TAG
DATA_KEY = 32


class _Contexts(threading.local):
    """What a thread works with again and again; neither is to be shared, and memory that is new is slow."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self.buffer: mmap.mmap | None = None

    def room(self, size: int) -> memoryview:
        """Memory for so many bytes; the same again for the next who asks for no more."""
        if self.buffer is None or len(self.buffer) < size:
            # Unlike a bytearray it is not zeroed while all other threads wait for the interpreter's lock.
            self.buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memoryview(self.buffer)[:size]


class Codec:
    """Packs and opens the chunks of one snapshot.

    Args:
        snapshot: its id.
        data_key: 32 bytes; None: not encrypted.
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
        return name_chunk(plain, self._name_key)

    def pack(self, name: str, plain: BytesLike) -> bytes:
        """A chunk as it is stored; while it is made it takes twice its size."""
        stored = self._frame(plain)
        if self._cipher is not None:
            nonce = os.urandom(NONCE)
            # Under one name, so that there are never more than two of them.
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
            size: plain bytes it must have; no more are ever taken from it.
            into: as many bytes of memory, to be unpacked into; None: this thread's own, which its next call
                may write over. What is stored as it is stays where it is.

        Raises:
            DataLoss: it is not the chunk of that name and size; ``into`` holds anything then.
        """
        framed = memoryview(stored if self._cipher is None else self._decrypt(name, stored))
        method = framed[0] if framed else -1
        if method == ZSTD:
            plain = self._decompress(name, framed[1:], size, into)
        elif method == RAW:
            plain = framed[1:]
        else:
            raise damaged(name, "it is packed in a way that is not known")
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
            raise damaged(name, "it does not open with this snapshot's key") from None

    def _decompress(self, name: str, framed: memoryview, size: int, into: memoryview | None) -> memoryview:
        packed = framed[LENGTH:]
        if len(packed) != int.from_bytes(framed[:LENGTH], "little"):
            raise damaged(name, "its compressed bytes do not end where they should")
        plain = self._contexts.room(size) if into is None else into
        reader = self._contexts.decompressor.stream_reader(packed)
        try:
            count = reader.readinto(plain)
            # A larger one is seen by its next byte and never unpacked.
            larger = count == size and reader.read(1)
        except zstandard.ZstdError as error:
            raise damaged(name, f"it cannot be decompressed: {error}") from None
        if larger:
            raise damaged(name, f"it unpacks to more than {size} bytes")
        return plain[:count]

    def _bound(self, name: str) -> bytes:
        return b"dumont chunk v1\0" + self.snapshot.encode() + b"\0" + name.encode()


def damaged(chunk: str, why: str) -> DataLoss:
    return DataLoss("CHUNK_DAMAGED", f"chunk {chunk[:16]}… is damaged: {why}", metadata={"chunk": chunk})

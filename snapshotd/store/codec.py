"""A chunk as it lies in the store: compressed if that helps, encrypted if there is a key.

The first byte says how the rest is packed. With a key, a random nonce and AES-256-GCM are around that;
the snapshot and the chunk's name are bound as associated data, so a chunk opens only where it belongs.
"""

from __future__ import annotations

import os
import sys

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dumont.errors import DataLoss
from snapshotd.store.chunking import name_chunk

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

RAW, ZSTD = b"\0", b"\1"
LEVEL = 1
# A window of 8 MiB is twice a chunk; a frame that wants more is none of ours.
LARGEST_WINDOW_LOG = 23
NONCE = 12
TAG = 16
# Stored bytes never exceed the plain ones by more.
OVERHEAD = 1 + NONCE + TAG
DATA_KEY = 32


class Codec:
    """Packs and opens the chunks of one snapshot.

    Args:
        snapshot: its id.
        data_key: 32 bytes; None: not encrypted.
    """

    def __init__(self, snapshot: str, data_key: bytes | None) -> None:
        self.snapshot = snapshot
        self._cipher = None if data_key is None else AESGCM(data_key)
        self._name_key = (
            None
            if data_key is None
            else blake3(data_key, derive_key_context="dumont v1 chunk names").digest()
        )

    def name(self, plain: bytes) -> str:
        return name_chunk(plain, self._name_key)

    def pack(self, name: str, plain: bytes) -> bytes:
        packed = zstd.compress(plain, LEVEL)
        framed = ZSTD + packed if len(packed) < len(plain) else RAW + plain
        if self._cipher is None:
            return framed
        nonce = os.urandom(NONCE)
        return nonce + self._cipher.encrypt(nonce, framed, self._bound(name))

    def open(self, name: str, stored: bytes, size: int) -> bytes:
        """The plain bytes of a chunk, verified.

        Args:
            size: plain bytes it must have; no more are ever taken from it.

        Raises:
            DataLoss: it is not the chunk of that name and size.
        """
        framed = stored if self._cipher is None else self._decrypt(name, stored)
        method, packed = framed[:1], framed[1:]
        if method == ZSTD:
            plain = self._decompress(name, packed, size)
        elif method == RAW:
            plain = packed
        else:
            raise damaged(name, "it is packed in a way that is not known")
        if len(plain) != size:
            raise damaged(name, f"it has {len(plain)} bytes instead of {size}")
        if self.name(plain) != name:
            raise damaged(name, "its bytes are not those that were stored")
        return plain

    def _decrypt(self, name: str, stored: bytes) -> bytes:
        assert self._cipher is not None
        try:
            return self._cipher.decrypt(stored[:NONCE], stored[NONCE:], self._bound(name))
        except (InvalidTag, ValueError):
            raise damaged(name, "it does not open with this snapshot's key") from None

    def _decompress(self, name: str, packed: bytes, size: int) -> bytes:
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: LARGEST_WINDOW_LOG}
        decompressor = zstd.ZstdDecompressor(options=options)
        try:
            # One byte more than it may have, so that a larger one is seen and never unpacked.
            plain = decompressor.decompress(packed, size + 1)
        except zstd.ZstdError as error:
            raise damaged(name, f"it cannot be decompressed: {error}") from None
        if len(plain) > size:
            raise damaged(name, f"it unpacks to more than {size} bytes")
        if not decompressor.eof or decompressor.unused_data:
            raise damaged(name, "its compressed bytes do not end where they should")
        return plain

    def _bound(self, name: str) -> bytes:
        return b"dumont chunk v1\0" + self.snapshot.encode() + b"\0" + name.encode()


def damaged(chunk: str, why: str) -> DataLoss:
    return DataLoss("CHUNK_DAMAGED", f"chunk {chunk[:16]}… is damaged: {why}", metadata={"chunk": chunk})

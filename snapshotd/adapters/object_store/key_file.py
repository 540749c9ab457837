"""The KeyWrapper port over a key file."""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dumont.errors import DataLoss
from snapshotd.repository.signing import read_secret

NONCE = 12


class KeyFile:
    """Wraps data keys with AES-256-GCM.

    Args:
        path: a file of 32 bytes or 64 hex digits (``openssl rand -hex 32``) that only its owner may read.

    Raises:
        FailedPrecondition: KEY_FILE_UNUSABLE, it is missing, it is not such a key, or others may read it.
    """

    def __init__(self, path: Path) -> None:
        key = read_secret(path, 32)
        self._cipher = AESGCM(key)
        self._key_id = blake3(key, derive_key_context="dumont v1 key id").hexdigest(16)

    @property
    def key_id(self) -> str:
        return self._key_id

    def wrap(self, data_key: bytes, context: bytes) -> bytes:
        nonce = os.urandom(NONCE)
        return nonce + self._cipher.encrypt(nonce, data_key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        try:
            return self._cipher.decrypt(wrapped[:NONCE], wrapped[NONCE:], context)
        except (InvalidTag, ValueError):
            raise DataLoss(
                "KEY_DAMAGED",
                "the data key cannot be decrypted: it was wrapped by another key or for another snapshot",
            ) from None

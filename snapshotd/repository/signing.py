"""Sign manifests and verify signatures. Each node signs with its own key and has a list of trusted keys."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dumont.errors import DataLoss, FailedPrecondition, PermissionDenied

KIND = "ed25519"
# Signed bytes begin with this, so that a signature is valid for nothing else.
DOMAIN = b"dumont snapshot v1\0"


class Signer:
    """A node's signing key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key()
        self.key_id = key_id(self.public)

    @classmethod
    def open(cls, path: Path) -> Signer:
        """Read the key from a file, or make it: 32 bytes that only the owner may read.

        Raises:
            FailedPrecondition: KEY_FILE_UNUSABLE, others may read it, or it is not a key.
        """
        if not path.exists():
            scratch = path.with_name(f".{path.name}-{os.getpid()}")
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(Ed25519PrivateKey.generate().private_bytes_raw())
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
        return cls(Ed25519PrivateKey.from_private_bytes(read_secret(path, 32)))

    def sign(self, document: bytes) -> bytes:
        """The signature of a document."""
        return self._private.sign(DOMAIN + document)

    def line(self) -> str:
        """The public key as a line of a list of trusted keys."""
        return f"{KIND} {base64.b64encode(self.public.public_bytes_raw()).decode()}"


class TrustedKeys:
    """A list of trusted public keys."""

    def __init__(self, keys: Iterable[Ed25519PublicKey]) -> None:
        self._keys: Mapping[str, Ed25519PublicKey] = {key_id(key): key for key in keys}

    @property
    def ids(self) -> frozenset[str]:
        """See :attr:`Trust.ids`."""
        return frozenset(self._keys)

    @classmethod
    def parse(cls, text: str, own: Signer) -> TrustedKeys:
        """Read lines ``ed25519 <base64> [comment]``; ``#`` begins a comment.

        Args:
            own: this node's key, which is always trusted.

        Raises:
            FailedPrecondition: TRUSTED_KEYS_UNREADABLE, a line is not a key.
        """
        keys = [own.public]
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            try:
                if words[0] != KIND:
                    raise ValueError
                keys.append(Ed25519PublicKey.from_public_bytes(base64.b64decode(words[1], validate=True)))
            except (ValueError, IndexError, binascii.Error):
                raise FailedPrecondition(
                    "TRUSTED_KEYS_UNREADABLE",
                    f"line {number} of the trusted keys must look like: {KIND} BASE64 [comment]",
                    metadata={"line": str(number)},
                ) from None
        return cls(keys)

    def verify(self, signer: str, document: bytes, signature: bytes) -> None:
        """See :meth:`Trust.verify`."""
        key = self._keys.get(signer)
        if key is None:
            raise untrusted(signer)
        try:
            key.verify(signature, DOMAIN + document)
        except InvalidSignature:
            raise DataLoss(
                "SIGNATURE_WRONG", "the manifest was changed after it was signed", metadata={"signer": signer}
            ) from None


def untrusted(signer: str) -> PermissionDenied:
    """The error for a signer that is not trusted."""
    return PermissionDenied(
        "UNTRUSTED_SIGNER",
        f"the manifest is signed by key {signer[:32]}, which is not among the trusted keys; add the "
        "public key of the node that captured it if it is yours",
        metadata={"signer": signer[:32]},
    )


def key_id(key: Ed25519PublicKey) -> str:
    """The first 128 bits of BLAKE3 of the public key, in hex."""
    return blake3(key.public_bytes_raw()).hexdigest(16)


def read_secret(path: Path, size: int) -> bytes:
    """Read a key of ``size`` bytes from a file that only its owner may read, raw or as hex digits.

    Raises:
        FailedPrecondition: KEY_FILE_UNUSABLE, it is missing, it is not such a key, or others may read it.
    """
    try:
        mode, data = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise _unusable(path, "may be read by others; chmod 600 it")
    if len(data) != size:
        try:
            data = bytes.fromhex(data.decode().strip())
        except ValueError:
            data = b""
    if len(data) != size:
        raise _unusable(path, f"must hold {size} bytes or {2 * size} hex digits")
    return data


def _unusable(path: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "KEY_FILE_UNUSABLE", f"the key file {path.name} {why}", metadata={"file": path.name}
    )

"""Fresh randomness after a restore: two replicas of one snapshot must never draw the same numbers."""

from __future__ import annotations

import hashlib
import os
import random
import sys

from dumont.errors import InvalidArgument

SIZE = 32


def parse(text: str) -> bytes:
    """The bytes in ``text``.

    Raises:
        InvalidArgument: INVALID_ENTROPY, not the hexadecimal form of 32 bytes.
    """
    try:
        entropy = bytes.fromhex(text)
    except ValueError:
        entropy = b""
    if len(entropy) != SIZE:
        raise InvalidArgument(
            "INVALID_ENTROPY", f"entropy must be {SIZE} bytes in hexadecimal", field="entropy"
        )
    return entropy


def reseed(entropy: bytes) -> None:
    """Reseed every generator of this process, each with its own seed drawn from ``entropy``.

    NumPy and torch are reseeded if the process has them.
    """
    random.seed(_derive(entropy, "python"))
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(list(_derive(entropy, "numpy")))
    if torch := sys.modules.get("torch"):
        torch.manual_seed(int.from_bytes(_derive(entropy, "torch")[:8], "little", signed=True))


def draws() -> dict[str, object]:
    """One draw from each generator, to tell replicas apart."""
    drawn: dict[str, object] = {"python": random.random(), "urandom": os.urandom(16).hex()}
    if numpy := sys.modules.get("numpy"):
        drawn["numpy"] = float(numpy.random.random())
    if torch := sys.modules.get("torch"):
        drawn["torch"] = float(torch.rand(1, dtype=torch.float64).item())
    return drawn


def _derive(entropy: bytes, purpose: str) -> bytes:
    return hashlib.blake2b(entropy, person=purpose.encode(), digest_size=32).digest()

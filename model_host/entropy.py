"""Fresh randomness after a restore: two replicas of one snapshot must never draw the same numbers.

Reseeded are the generators that Python, NumPy, torch and OpenSSL share, the names that ``tempfile`` makes,
and the ``random.Random`` and NumPy generators that existed when the model was loaded. What cannot be found,
and so an engine must not hold when it is captured, is listed in docs/decisions/0019.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

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


def held() -> list[Any]:
    """The generators that something in this process holds for itself; those of NumPy if the process has it.

    Looks at every object, so do it while nobody waits.
    """
    kinds: list[type] = [random.Random]
    if numpy := sys.modules.get("numpy"):
        kinds += [numpy.random.Generator, numpy.random.RandomState]
    wanted = tuple(kinds)
    # By their types: whatever else lives here may answer oddly when it is asked for its class.
    return [
        one
        for one in gc.get_objects()
        if issubclass(kind := type(one), wanted) and not issubclass(kind, random.SystemRandom)
    ]


def reseed(entropy: bytes, generators: Iterable[Any] = ()) -> None:
    """Reseed every generator of this process, each with its own seed drawn from ``entropy``.

    NumPy, torch and OpenSSL are reseeded if the process has them.

    Args:
        generators: what :func:`held` found.
    """
    for number, generator in enumerate(generators):
        _reseed_one(generator, _derive(entropy, f"held {number}"))
    random.seed(_derive(entropy, "python"))
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(list(_derive(entropy, "numpy")))
    if torch := sys.modules.get("torch"):
        torch.manual_seed(int.from_bytes(_derive(entropy, "torch")[:8], "little", signed=True))
    if ssl := sys.modules.get("ssl"):
        # Every thread's generator notices that what it is seeded from has changed.
        ssl.RAND_add(_derive(entropy, "openssl"), float(SIZE))
    # It makes a new sequence of names when it needs one.
    tempfile._name_sequence = None  # type: ignore[attr-defined]


def draws() -> dict[str, object]:
    """One draw from each generator, to tell replicas apart."""
    import ssl  # seldom needed, and then by a library that brings it

    drawn: dict[str, object] = {
        "python": random.random(),
        "urandom": os.urandom(16).hex(),
        "tempfile": next(tempfile._get_candidate_names()),  # type: ignore[attr-defined]
        "openssl": ssl.RAND_bytes(16).hex(),
    }
    if numpy := sys.modules.get("numpy"):
        drawn["numpy"] = float(numpy.random.random())
    if torch := sys.modules.get("torch"):
        drawn["torch"] = float(torch.rand(1, dtype=torch.float64).item())
    return drawn


def _reseed_one(generator: Any, seed: bytes) -> None:
    if isinstance(generator, random.Random):
        generator.seed(seed)
    elif hasattr(generator, "seed"):  # NumPy's older kind, which keeps a number that it drew ahead as well
        generator.seed(list(seed))
    else:
        bits = generator.bit_generator
        bits.state = type(bits)(list(seed)).state


def _derive(entropy: bytes, purpose: str) -> bytes:
    return hashlib.blake2b(purpose.encode(), key=entropy, digest_size=SIZE).digest()

"""What whoever owns a bucket does to its objects."""

from __future__ import annotations

import zstandard

from snapshotd.repository.codec import LENGTH
from snapshotd.repository.model import CHUNK


def flip_a_byte(stored: bytes) -> bytes:
    """A compressed chunk with one byte inverted that counts.

    Some do not: of a real image two flips in a thousand leave what zstd unpacks as it was, and such a chunk
    is rightly taken.
    """
    data, plain = bytearray(stored), _unpack(stored)
    place = len(data) // 2
    while _unpack(data) == plain:
        data[place] ^= 0xFF
        place += 1
    return bytes(data)


def _unpack(stored: bytes | bytearray) -> bytes | None:
    try:
        return zstandard.decompress(bytes(stored[1 + LENGTH :]), max_output_size=CHUNK)
    except zstandard.ZstdError:
        return None

"""Weights brought into GPU memory by the node's loader while this process cannot use its GPU yet.

The loader keeps weight files registered with the GPU and copies them at the speed of the bus: 54 GB/s, where
a process that has just come back reaches 10 to 25. What it copied into becomes this process's own memory.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# What the libraries that compute expect of a pointer.
ALIGNMENT: Final = 256
# The loader allocates in units of 2 MiB.
UNIT: Final = 2 << 20
# Seconds. A loader that is well takes an order at once, and brings 15 GB in 0.3 s. Together they are well
# below a wake's deadline, so that there is time left to copy the weights here.
ORDER_TIMEOUT: Final = 2.0
RECEIVE_TIMEOUT: Final = 15.0


class DeliveryFailed(Exception):
    """The loader is not there, or could not do it."""


@dataclass(frozen=True)
class Extent:
    """Where the bytes of a tensor lie: ``size`` of them, ``offset`` into ``file``."""

    file: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Plan:
    """Where each tensor goes in one block of GPU memory.

    Attributes:
        size: of the block, in bytes.
        places: offset of each tensor in it, by name.
        pieces: what to copy: file, offset in it, bytes, offset in the block.
    """

    size: int
    places: Mapping[str, int]
    pieces: tuple[tuple[str, int, int, int], ...]


def extents(shards: Iterable[Path]) -> dict[str, Extent]:
    """Where each tensor of the safetensors files lies, by name.

    Source: the safetensors format, a JSON header behind its length (u64, little-endian).
    """
    found = {}
    for shard in shards:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            found[name] = Extent(shard, 8 + length + begin, end - begin)
    return found


def plan(tensors: Mapping[str, Extent]) -> Plan:
    """Keep neighbours in a file neighbours in memory, as long as each stays aligned."""
    places: dict[str, int] = {}
    pieces: list[tuple[str, int, int, int]] = []
    end = 0
    for name, extent in sorted(tensors.items(), key=lambda item: (str(item[1].file), item[1].offset)):
        place = -(-end // ALIGNMENT) * ALIGNMENT
        places[name] = place
        if pieces:
            file, offset, size, start = pieces[-1]
            if (file, offset + size, start + size) == (str(extent.file), extent.offset, place):
                pieces[-1] = (file, offset, size + extent.size, start)
                end = place + extent.size
                continue
        pieces.append((str(extent.file), extent.offset, extent.size, place))
        end = place + extent.size
    return Plan(-(-end // UNIT) * UNIT, places, tuple(pieces))


class Delivery:
    """Weights that were asked for and are on their way."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        self.size = size
        self._connection = connection

    @classmethod
    def order(cls, loader: Path, gpu: str, plan: Plan) -> Delivery:
        """Ask for what ``plan`` says; returns at once.

        Args:
            loader: the loader's socket.
            gpu: UUID of the GPU.

        Raises:
            DeliveryFailed: nobody listens there.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(ORDER_TIMEOUT)
            connection.connect(str(loader))
            order = {"gpu": gpu, "size": plan.size, "pieces": plan.pieces}
            connection.sendall(json.dumps(order).encode() + b"\n")
        except OSError as error:
            connection.close()
            raise DeliveryFailed(f"{loader}: {error}") from error
        return cls(connection, plan.size)

    def receive(self) -> int:
        """Wait until everything is there; a descriptor of the memory, which the caller closes.

        The connection is closed in any case: a loader that is still at it gives its memory back then.

        Raises:
            DeliveryFailed: the loader could not do it, or is gone.
        """
        try:
            self._connection.settimeout(RECEIVE_TIMEOUT)
            data, descriptors, _, _ = socket.recv_fds(self._connection, 4096, 1)
        except OSError as error:
            raise DeliveryFailed(f"the loader gave no answer: {error}") from error
        finally:
            self._connection.close()
        if not descriptors:
            raise DeliveryFailed(data.decode(errors="replace") or "the loader is gone")
        return descriptors[0]

    def cancel(self) -> None:
        """Want it no more; the loader notices and gives its memory back."""
        self._connection.close()

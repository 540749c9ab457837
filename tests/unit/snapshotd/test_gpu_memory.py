"""Nothing is brought back to a GPU that has no room for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from dumont.errors import ResourceExhausted
from snapshotd.jobs import moves

GIB = 1 << 30


@dataclass
class FakeGpuMemory:
    free_bytes: dict[int, int]

    def used_by(self, pid: int) -> int:
        return pid * GIB

    def free(self, index: int) -> int:
        return self.free_bytes[index]


@dataclass
class NodeWithGpus:
    gpu_memory: Any


NODE: Any = NodeWithGpus(FakeGpuMemory({0: 2 * GIB, 1: 40 * GIB}))


@pytest.mark.parametrize(("device", "needed"), [("cuda:0", 2 * GIB), ("cuda:1", 40 * GIB), ("cuda", GIB)])
def test_what_fits_is_let_through(device: str, needed: int) -> None:
    assert moves.check_gpu_memory(NODE, device, needed) is None


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(ResourceExhausted) as refusal:
        moves.check_gpu_memory(NODE, "cuda:0", 3 * GIB)
    assert refusal.value.reason == "GPU_MEMORY"
    assert refusal.value.metadata == {
        "device": "cuda:0",
        "free_bytes": str(2 * GIB),
        "needed_bytes": str(3 * GIB),
    }


@pytest.mark.parametrize(("node", "device"), [(NodeWithGpus(None), "cuda:0"), (NODE, "cpu")])
def test_without_a_gpu_nothing_is_asked(node: Any, device: str) -> None:
    assert moves.check_gpu_memory(node, device, 1 << 60) is None

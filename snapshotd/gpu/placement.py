"""Which GPU of the node an instance goes to. Pure: facts in, a GPU out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dumont.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from snapshotd.model import Gpu


@dataclass
class Reservations:
    """GPU memory promised to jobs under way, which the driver does not count as taken yet."""

    _promised: dict[str, tuple[str, int]] = field(default_factory=dict)

    def reserve(self, instance: str, gpu: str, needed: int) -> None:
        self._promised[instance] = (gpu, needed)

    def release(self, instance: str) -> None:
        self._promised.pop(instance, None)

    def reserved(self, gpu: str) -> int:
        """Bytes of one GPU, by its UUID."""
        return sum(needed for where, needed in self._promised.values() if where == gpu)


def named(gpus: Sequence[Gpu], wanted: str) -> Gpu:
    """The GPU that a caller named, by its UUID or its index among the node's.

    Raises:
        InvalidArgument: the node has no such GPU.
    """
    for index, gpu in enumerate(gpus):
        if wanted in (gpu.uuid, str(index)):
            return gpu
    here = ", ".join(f"{index}: {gpu.uuid}" for index, gpu in enumerate(gpus)) or "none"
    raise InvalidArgument(
        "GPU_UNKNOWN", f"this node has no GPU {wanted[:80]!r}; its GPUs are {here}", field="gpu"
    )


def alike(one: Gpu, other: Gpu) -> bool:
    """Whether a process of one can be brought back on the other."""
    return (one.model, one.memory_total) == (other.model, other.memory_total)


def choose(gpus: Sequence[Gpu], free: Mapping[str, int], home: Gpu | None, wanted: str = "") -> Gpu:
    """The GPU for an instance: the one that is wanted, else the one with the most room.

    Args:
        gpus: the node's; at least one.
        free: bytes that nobody holds or was promised, by UUID.
        home: where its state comes from, preferred among equals; None: it has none yet.
        wanted: UUID or index; empty: any.

    Raises:
        InvalidArgument: the node has no such GPU.
        FailedPrecondition: it is of another kind than ``home``.
    """
    if wanted:
        gpu = named(gpus, wanted)
        if home is not None and not alike(gpu, home):
            raise FailedPrecondition(
                "GPU_MODEL",
                f"{gpu.uuid} is a {gpu.model} of {gpu.memory_total >> 20} MiB, and the process comes from a "
                f"{home.model} of {home.memory_total >> 20} MiB; name a GPU of that kind",
                metadata={"gpu": gpu.uuid, "home": home.uuid},
            )
        return gpu
    candidates = [gpu for gpu in gpus if home is None or alike(gpu, home)]
    return max(candidates, key=lambda gpu: (free.get(gpu.uuid, 0), gpu == home))


def check_free_memory(gpu: Gpu, free: int, needed: int) -> None:
    """Refuse before the driver begins: a CUDA restore that runs out of memory strands its process.

    Raises:
        ResourceExhausted: the GPU has less free than ``needed`` bytes.
    """
    if free < needed:
        raise ResourceExhausted(
            "GPU_MEMORY",
            f"{gpu.uuid} has {max(free, 0) >> 20} MiB free and the process needs {needed >> 20}; "
            "park or stop another",
            metadata={"gpu": gpu.uuid, "free_bytes": str(max(free, 0)), "needed_bytes": str(needed)},
        )


def arrange(captured: Sequence[str], here: Sequence[str]) -> dict[str, str]:
    """Captured UUIDs to UUIDs here: each to itself where it still exists, the others in order.

    Raises:
        FailedPrecondition: their numbers differ, or one is named twice.
    """
    if len(captured) != len(here) or len(set(captured)) != len(captured) or len(set(here)) != len(here):
        raise FailedPrecondition(
            "GPU_MAP",
            f"{len(set(captured))} GPUs cannot be mapped to {len(set(here))}: each needs one of its own",
            metadata={"captured": ",".join(captured), "here": ",".join(here)},
        )
    others = iter([gpu for gpu in here if gpu not in captured])
    return {gpu: gpu if gpu in here else next(others) for gpu in captured}


def device_map(captured: Sequence[str], here: Sequence[str], source: str, target: str) -> dict[str, str]:
    """The map that brings what was on ``source`` to ``target``; empty when nothing changes place.

    The driver wants every GPU of the node in it, also those that the process does not use or see, and
    each of them once: what would have come to ``target`` goes where ``source`` would have gone.

    Args:
        captured: UUIDs of the node's GPUs at capture.
        here: those of this node.
        source: one of ``captured``.
        target: one of ``here``.

    Raises:
        FailedPrecondition: there is no such map.
    """
    places = arrange(captured, here)
    displaced = next((gpu for gpu, place in places.items() if place == target), "")
    if source not in places or not displaced:
        raise FailedPrecondition(
            "GPU_MAP",
            f"{source if source not in places else target} is not among the GPUs it should be mapped with",
            metadata={"captured": ",".join(captured), "here": ",".join(here)},
        )
    places[displaced], places[source] = places[source], target
    return {} if all(old == new for old, new in places.items()) else places

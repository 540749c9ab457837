"""Which GPU of the node an instance goes to. Pure: facts in, a GPU out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dumont.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from snapshotd.model import Gpu


@dataclass
class Reservations:
    """GPU memory set aside for jobs under way, which the driver does not count as used yet."""

    _reserved: dict[str, tuple[str, int]] = field(default_factory=dict)

    def reserve(self, instance: str, gpu: str, needed: int) -> None:
        """Set aside ``needed`` bytes of a GPU, by its UUID, in place of what the instance had reserved."""
        self._reserved[instance] = (gpu, needed)

    def release(self, instance: str) -> None:
        """Give back what an instance had reserved, if anything."""
        self._reserved.pop(instance, None)

    def reserved(self, gpu: str) -> int:
        """Bytes that are reserved on one GPU, by its UUID."""
        return sum(needed for where, needed in self._reserved.values() if where == gpu)


def named(gpus: Sequence[Gpu], wanted: str) -> Gpu:
    """The GPU that a caller named by its UUID or by its index among the node's GPUs.

    Raises:
        InvalidArgument: GPU_UNKNOWN, the node has no such GPU.
    """
    for index, gpu in enumerate(gpus):
        if wanted in (gpu.uuid, str(index)):
            return gpu
    here = ", ".join(f"{index}: {gpu.uuid}" for index, gpu in enumerate(gpus)) or "none"
    raise InvalidArgument(
        "GPU_UNKNOWN", f"this node has no GPU {wanted[:80]!r}; its GPUs are {here}", field="gpu"
    )


def alike(one: Gpu, other: Gpu) -> bool:
    """Whether a process that was suspended on one GPU can resume on the other."""
    return (one.model, one.memory_total) == (other.model, other.memory_total)


def choose(gpus: Sequence[Gpu], free: Mapping[str, int], home: Gpu | None, wanted: str = "") -> Gpu:
    """The GPU for an instance: the wanted one, or else the one with the most free memory.

    Args:
        gpus: the node's GPUs; at least one.
        free: bytes that are neither in use nor reserved, by UUID.
        home: where the state of the process comes from, preferred among equals; None for a new process.
        wanted: UUID or index; empty for any.

    Raises:
        InvalidArgument: GPU_UNKNOWN, the node has no such GPU.
        FailedPrecondition: GPU_MODEL, the wanted GPU is of another model than ``home``.
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
    """Refuse a job for which a GPU has too little memory, before the driver begins.

    A CUDA restore that runs out of memory leaves its process unusable.

    Raises:
        ResourceExhausted: GPU_MEMORY, the GPU has fewer than ``needed`` bytes free.
    """
    if free < needed:
        raise ResourceExhausted(
            "GPU_MEMORY",
            f"{gpu.uuid} has {max(free, 0) >> 20} MiB free and the process needs {needed >> 20}; "
            "park or stop another",
            metadata={"gpu": gpu.uuid, "free_bytes": str(max(free, 0)), "needed_bytes": str(needed)},
        )


def arrange(captured: Sequence[str], here: Sequence[str]) -> dict[str, str]:
    """Map UUIDs at capture to UUIDs here: each to itself if it still exists, the others in order.

    Raises:
        FailedPrecondition: GPU_MAP, the numbers of GPUs differ, or one is named twice.
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
    """The device map for a CUDA restore that brings the state on ``source`` to ``target``.

    The driver requires every GPU of the node in the map, even those that the process does not use or see,
    and each of them once. So the state that would have come to ``target`` goes where that of ``source``
    would have gone.

    Args:
        captured: UUIDs of the node's GPUs at capture.
        here: UUIDs of this node's GPUs.
        source: one of ``captured``.
        target: one of ``here``.

    Returns:
        Old UUIDs to new ones; empty if no state changes place.

    Raises:
        FailedPrecondition: GPU_MAP, there is no such map.
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

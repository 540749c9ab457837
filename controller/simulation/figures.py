"""What the simulated nodes and models are like: measured on real ones where ``figures.json`` says so."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

# Minimum, median and maximum of what was measured, in seconds.
Spread = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Model:
    """A model; ``share`` of the deployments have it, each with weights of its own."""

    name: str
    share: float
    cold: Spread
    resume: Spread
    restore: Spread
    park: Spread
    first_token: float
    tokens_per_second: float
    gpu_bytes: int
    image_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A node with one GPU or more of ``gpu_bytes``; these were assumed, not measured."""

    gpu_bytes: int
    node_memory_bytes: int
    parked_memory_bytes: int
    weight_cache_bytes: int
    store_bytes_per_second: float
    disk_bytes_per_second: float
    stop_seconds: float


def load() -> tuple[tuple[Model, ...], Machine]:
    """The models and the machine of ``figures.json``."""
    document = json.loads(files(__package__).joinpath("figures.json").read_text())
    return tuple(_model(one) for one in document["models"]), Machine(**document["assumed"])


def _model(facts: dict[str, Any]) -> Model:
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
    return Model(**plain)


def draw(spread: Spread, generator: random.Random) -> float:
    """A duration of this spread: half of all are below the median."""
    least, median, most = spread
    part = generator.random()
    if part < 0.5:
        return least + (median - least) * 2 * part
    return median + (most - median) * (2 * part - 1)

"""Requests of many deployments: few are busy, most are idle, and all come in bursts. Pure.

The mean rates are those of Azure Functions in 2019: 45 % of the applications are invoked once an hour or less
and 81 % once a minute or less (Shahrad et al., Serverless in the Wild, USENIX ATC 2020). Within these bounds
they are log-uniform. The busiest are cut off at ``BUSIEST``: they stay resident under every policy and would
only cost simulation time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from controller.simulation.figures import Model

# Parts of the deployments, and the requests a minute of each part, from and to.
RATES: Final = ((0.45, 1 / (7 * 24 * 60), 1 / 60), (0.36, 1 / 60, 1.0), (0.19, 1.0, 3.0))
BUSIEST: Final = RATES[-1][2]
# Requests of one burst, and the mean seconds between two of them: somebody who tries a model, or a batch job.
BURST: Final = 4.0
BURST_GAP: Final = 5.0
# Tokens of an answer: the median and the spread of a log-normal distribution.
TOKENS: Final = 200
TOKENS_SIGMA: Final = 0.8
MOST_TOKENS: Final = 2000


@dataclass(frozen=True, slots=True, order=True)
class Arrival:
    """A request: when it comes, in seconds from the start, for which deployment, and its answer's length."""

    at: float
    deployment: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """All requests in order, and the model of each deployment."""

    arrivals: tuple[Arrival, ...]
    models: tuple[Model, ...]
    seconds: float


def make(deployments: int, seconds: float, models: Sequence[Model], seed: int) -> Trace:
    """The requests of so many deployments; the same seed makes the same ones.

    Args:
        deployments: how many.
        seconds: how long.
        models: of which each deployment gets one, by their shares.
        seed: of the random generator.
    """
    generator = random.Random(seed)
    chosen = tuple(
        generator.choices(models, weights=[model.share for model in models])[0] for _ in range(deployments)
    )
    arrivals: list[Arrival] = []
    for deployment in range(deployments):
        arrivals += _requests(deployment, _rate(generator), seconds, generator)
    return Trace(tuple(sorted(arrivals)), chosen, seconds)


def _rate(generator: random.Random) -> float:
    """Requests a second."""
    _, least, most = generator.choices(RATES, weights=[part for part, _, _ in RATES])[0]
    per_minute: float = math.exp(generator.uniform(math.log(least), math.log(most)))
    return per_minute / 60


def _requests(deployment: int, rate: float, seconds: float, generator: random.Random) -> list[Arrival]:
    found: list[Arrival] = []
    begin = generator.expovariate(rate / BURST)
    while begin < seconds:
        at = begin
        while at < seconds:
            tokens = int(generator.lognormvariate(math.log(TOKENS), TOKENS_SIGMA))
            found.append(Arrival(at, deployment, min(MOST_TOKENS, max(1, tokens))))
            if generator.random() < 1 / BURST:
                break
            at += generator.expovariate(1 / BURST_GAP)
        begin += generator.expovariate(rate / BURST)
    return found

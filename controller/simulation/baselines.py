"""The policies to compare with, without a controller: they need nothing that one knows. Pure.

They are given more than they would have: one pool of GPU memory instead of many GPUs, starts that cannot fail
and weights that are always in memory.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass

from controller.simulation.figures import Machine, draw
from controller.simulation.results import Result, Tally
from controller.simulation.trace import Trace


def always_warm(trace: Trace, machine: Machine) -> Result:
    """Every deployment has an instance all the time."""
    tally = Tally()
    for arrival in trace.arrivals:
        tally.answered("resident", trace.models[arrival.deployment].first_token)
    held = sum(model.gpu_bytes for model in trace.models)
    return tally.result("always warm", held / machine.gpu_bytes * trace.seconds / 3600)


@dataclass(slots=True)
class _Instance:
    """When it serves, until when it answers, and since when it holds memory."""

    ready: float
    busy_until: float
    since: float


def always_cold(trace: Trace, machine: Machine, seed: int) -> Result:
    """Every instance loads its model and ends with its last answer."""
    return _caching(trace, machine, seed, "always cold", pool=0)


def least_recently_used(trace: Trace, machine: Machine, gpus: int, seed: int) -> Result:
    """Instances stay until another one needs their memory; the one that was used longest ago goes first."""
    return _caching(trace, machine, seed, "LRU, cold starts", pool=gpus * machine.gpu_bytes)


def _caching(trace: Trace, machine: Machine, seed: int, name: str, pool: int) -> Result:
    """Answer from instances that are kept while the pool has room; 0: they end with their last answer."""
    generator = random.Random(seed)
    tally = Tally()
    kept: OrderedDict[int, _Instance] = OrderedDict()
    free, held = pool, 0.0

    def end(deployment: int, at: float) -> None:
        nonlocal free, held
        instance = kept.pop(deployment)
        free += trace.models[deployment].gpu_bytes
        held += trace.models[deployment].gpu_bytes * (min(at, trace.seconds) - instance.since)

    for arrival in trace.arrivals:
        model = trace.models[arrival.deployment]
        instance = kept.get(arrival.deployment)
        if instance is not None and not pool and instance.busy_until <= arrival.at:
            end(arrival.deployment, instance.busy_until)
            instance = None
        tier = "resident"
        if instance is None:
            tier, begin = "cold", arrival.at
            while pool and free < model.gpu_bytes:
                # The least recently used one that is idle; if all are busy, the one that is idle first.
                idle = next((d for d, known in kept.items() if known.busy_until <= begin), None)
                victim = idle if idle is not None else min(kept, key=lambda d: kept[d].busy_until)
                begin = max(begin, kept[victim].busy_until)
                end(victim, begin)
            free -= model.gpu_bytes
            ready = begin + draw(model.cold, generator)
            instance = kept[arrival.deployment] = _Instance(ready, ready, begin)
        kept.move_to_end(arrival.deployment)
        first = max(arrival.at, instance.ready) + model.first_token
        instance.busy_until = max(instance.busy_until, first + arrival.tokens / model.tokens_per_second)
        tally.answered(tier, first - arrival.at)
    for deployment in list(kept):
        end(deployment, trace.seconds if pool else kept[deployment].busy_until)
    return tally.result(name, held / machine.gpu_bytes / 3600)

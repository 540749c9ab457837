"""Samples and their statistics. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

PLAIN: Final = ("plain_cold", "plain_cold_after_imports")
PRODUCT: Final = ("cold", "parked", "local")
CASES: Final = (*PLAIN, *PRODUCT, "stock")
# Their answers come from the same code, so every token must be the same.
SAME_ANSWER: Final = (("plain_cold",), PRODUCT, ("stock",))
BASELINES: Final = ("plain_cold", "stock")


@dataclass(frozen=True)
class Sample:
    """One way to a first token, measured once.

    Args:
        seconds: until the first token.
        phases: the seconds of each step among them, in order.
        tokens: the greedy answer.
    """

    seconds: float
    phases: Mapping[str, float]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """Median and extremes of a measurement that was repeated."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Costs:
    """What a way to a first token costs beforehand and in the meantime.

    Args:
        image_bytes: on disk.
        stored_bytes: compressed, in chunks, as an object store would hold it.
        source_pause: seconds for which the captured process did not serve.
        capture_phases: medians of the steps of the capture, also of those after the pause.
        park: seconds that parking took.
        gpu_bytes_serving: memory of the GPU that the serving instance takes.
        gpu_bytes_parked: the same of the parked one.
    """

    image_bytes: int | None = None
    stored_bytes: int | None = None
    source_pause: Spread | None = None
    capture_phases: Mapping[str, float] = field(default_factory=dict)
    park: Spread | None = None
    gpu_bytes_serving: int | None = None
    gpu_bytes_parked: int | None = None


@dataclass(frozen=True)
class Row:
    """A case of a model: seconds to the first token.

    Args:
        phases: medians; they need not add up to the median of the seconds.
        ratios: how many times longer each baseline took.
    """

    model: str
    case: str
    rounds: int
    seconds: Spread
    phases: Mapping[str, float]
    ratios: Mapping[str, float]
    costs: Costs


def after_imports(sample: Sample) -> Sample:
    """The same run, with the clock started after the imports."""
    phases = {name: seconds for name, seconds in sample.phases.items() if name != "imports"}
    return Sample(sample.seconds - sample.phases["imports"], phases, sample.tokens)


def apart(phases: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Steps without overlap: a step with parts, ``load`` with ``load.…``, keeps the rest of its time."""
    seconds: dict[str, float] = {}
    for name, value in phases:
        seconds[name] = seconds.get(name, 0.0) + value
    for name, value in list(seconds.items()):
        whole, dot, _ = name.rpartition(".")
        if dot and whole in seconds:
            seconds[whole] = max(0.0, seconds[whole] - value)
    return seconds


def sample(
    seconds: float, job: Sequence[tuple[str, float]], first_token: float, tokens: Sequence[int]
) -> Sample:
    """What a client measured: the reported steps, the first token, and the rest as ``other``."""
    phases = {**apart(job), "first_token": first_token}
    rest = seconds - sum(phases.values())
    return Sample(seconds, {**phases, "other": max(0.0, rest)}, tuple(tokens))


def medians(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each step, in the order of the first sample; a step that a sample lacks took no time."""
    names = dict.fromkeys(name for phases in samples for name in phases)
    return {name: statistics.median(phases.get(name, 0.0) for phases in samples) for name in names}


def rows(
    model: str, samples: Mapping[str, Sequence[Sample]], costs: Mapping[str, Costs], cases: Sequence[str]
) -> list[Row]:
    """One row for each of the cases, in their usual order."""
    spreads = {case: Spread.of([one.seconds for one in taken]) for case, taken in samples.items()}
    return [
        Row(
            model=model,
            case=case,
            rounds=len(samples[case]),
            seconds=spreads[case],
            phases=medians([one.phases for one in samples[case]]),
            ratios={
                base: spreads[base].median / spreads[case].median
                for base in BASELINES
                if base in spreads and base != case
            },
            costs=costs.get(case, Costs()),
        )
        for case in CASES
        if case in cases
    ]


def different_answers(samples: Mapping[str, Sequence[Sample]]) -> str:
    """Which answers differ although they must be equal; empty if none do."""
    for group in SAME_ANSWER:
        answers = {one.tokens: case for case in group for one in samples.get(case, ())}
        if len(answers) > 1:
            return ", ".join(f"{case} {list(tokens)}" for tokens, case in answers.items())
    return ""

"""Choosing a token from logits on the CPU, for one sequence or for the rows of a batch.

On a GPU a kernel of our own chooses for all rows (``kernels.py``), but the likeliest tokens that are
reported beside the chosen one are found here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dumont.errors import Internal
from model_host.engine import Generation

# A nucleus is first looked for among this many of the likeliest tokens: sorting a whole vocabulary takes ten
# times longer.
LIKELY: Final = (1024, 16384)

# The likeliest few are looked for in as many blocks of this size, those with the largest maxima. A whole
# vocabulary would take ten times longer.
BLOCK: Final = 256

# Below it a draw gives the likeliest token anyway, and single precision no longer suffices.
SMALLEST_TEMPERATURE: Final = 1e-6

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How one sequence's tokens are chosen; every field has its effective value.

    Args:
        ends: tokens that are not chosen before ``min_new_tokens``.
        logprobs: how many of the likeliest tokens are reported beside the chosen one; None: nothing is.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    logprobs: int | None = None

    @classmethod
    def of(
        cls,
        request: Generation,
        defaults: Mapping[str, Any],
        ends: frozenset[int],
        banned: frozenset[int] = frozenset(),
    ) -> Sampling:
        """What a request asks for, completed from the model's ``generation_config.json``.

        Args:
            defaults: for fields that the request leaves out.
            banned: tokens that are never chosen.
        """

        def pick(value: Any, name: str, neutral: Any) -> Any:
            if value is not None:
                return value
            given = defaults.get(name)
            return neutral if given is None else given

        return cls(
            temperature=request.temperature,
            top_k=int(pick(request.top_k, "top_k", 0)),
            top_p=float(pick(request.top_p, "top_p", 1.0)),
            min_p=float(pick(request.min_p, "min_p", 0.0)),
            repetition=float(pick(request.repetition_penalty, "repetition_penalty", 1.0)),
            presence=request.presence_penalty,
            frequency=request.frequency_penalty,
            bias={**request.logit_bias, **dict.fromkeys(banned, -np.inf)},
            ends=ends,
            min_new_tokens=request.min_new_tokens,
            logprobs=request.logprobs,
        )

    @property
    def penalised(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0

    def biases(self, given: int) -> dict[int, float]:
        """What is added to logits once the answer has ``given`` tokens."""
        if given >= self.min_new_tokens:
            return dict(self.bias)
        return {**self.bias, **dict.fromkeys(self.ends, -np.inf)}

    def greedy(self, given: int) -> bool:
        """Whether the next token is simply the likeliest."""
        return self.temperature == 0 and not self.penalised and not self.bias and given >= self.min_new_tokens


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability if asked for, and the likeliest at its position."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def choose(
    logits: Floats,
    sampling: Sampling,
    prompt: Sequence[int],
    answer: Sequence[int],
    generator: np.random.Generator | None,
) -> Chosen:
    """The next token of a sequence.

    Args:
        logits: shape (vocabulary,); not changed.
        generator: None: the process's own, which is seeded anew when a restored process wakes.

    Raises:
        Internal: NOT_A_NUMBER.
    """
    best = float(logits.max())
    if not np.isfinite(best):
        raise Internal("NOT_A_NUMBER", "the model computed no probabilities for the next token")
    if sampling.greedy(len(answer)):
        token = int(logits.argmax())
    else:
        adjusted = adjust(logits, sampling, prompt, answer)
        token = int(adjusted.argmax())
        if sampling.temperature > 0:
            # Less the best before dividing, so that a tiny temperature makes no infinities.
            scaled = (adjusted - adjusted[token]) / np.float32(
                max(sampling.temperature, SMALLEST_TEMPERATURE)
            )
            chance = np.random.random() if generator is None else generator.random()
            token = draw(scaled, chance, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p)
    if sampling.logprobs is None:
        return Chosen(token)
    return report(logits, token, sampling.logprobs)


def report(logits: Floats, token: int, top: int, logprob: float | None = None) -> Chosen:
    """A token with its log-probability and those of the ``top`` likeliest.

    Args:
        logprob: the token's, if it is known.
    """
    if logprob is None:
        best = logits.max()
        logprob = float(logits[token] - best - np.log(np.exp(logits - best).sum(dtype=np.float64)))
    likeliest = largest(logits, top)
    normaliser = float(logits[token]) - logprob
    return Chosen(token, logprob, tuple((i, float(logits[i]) - normaliser) for i in likeliest))


def largest(logits: Floats, count: int) -> list[int]:
    """The places of the ``count`` largest, the largest first."""
    if count == 0:
        return []
    starts = np.arange(0, len(logits), BLOCK)
    if count < len(starts):
        # As many blocks as places: outside these, nothing is larger than the peak of each of them.
        peaks = np.maximum.reduceat(logits, starts)
        starts = starts[np.argpartition(peaks, -count)[-count:]]
    places = (starts[:, None] + np.arange(BLOCK)).ravel()
    places = places[places < len(logits)]
    if count < len(places):
        places = places[np.argpartition(logits[places], -count)[-count:]]
    found: list[int] = places[np.argsort(-logits[places], kind="stable")].tolist()
    return found


def adjust(logits: Floats, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Floats:
    """Logits after penalties and biases.

    Source: the repetition penalty is that of Keskar et al., CTRL, 2019; the others are those of OpenAI's API.
    """
    adjusted = logits.astype(np.float32)
    if sampling.penalised:
        seen = np.unique(np.fromiter((*prompt, *answer), dtype=np.int64))
        found = adjusted[seen]
        adjusted[seen] = np.where(found > 0, found / sampling.repetition, found * sampling.repetition)
        if answer:
            given, times = np.unique(np.asarray(answer, dtype=np.int64), return_counts=True)
            adjusted[given] -= np.float32(sampling.presence) + np.float32(sampling.frequency) * times
    for token, value in sampling.biases(len(answer)).items():
        adjusted[token] += np.float32(value)
    return adjusted


def draw(logits: Floats, chance: float, *, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> int:
    """A token drawn from the likeliest: those within ``top_k``, then within ``top_p``, then above ``min_p``.

    Source for ``top_p``: Holtzman et al., The Curious Case of Neural Text Degeneration, 2020.

    Args:
        logits: shape (vocabulary,), the largest 0.
        chance: uniform in [0, 1).
        top_p: above 0 and at most 1; the smallest set of tokens that has this probability.
        top_k: 0 means all.
        min_p: relative to the likeliest.
    """
    weights = np.exp(logits - logits.max(), dtype=np.float32)
    tokens = np.arange(len(weights))
    if 0 < top_k < len(weights):
        tokens = np.argpartition(weights, -top_k)[-top_k:]
    if top_p < 1:
        tokens = tokens[_nucleus(weights[tokens], top_p)]
    if min_p > 0:
        tokens = tokens[weights[tokens] >= min_p]  # the likeliest has weight 1
    steps = np.cumsum(weights[tokens], dtype=np.float64)
    place = int(np.searchsorted(steps, chance * steps[-1], side="right"))
    return int(tokens[min(place, len(tokens) - 1)])


def _nucleus(weights: Floats, top_p: float) -> NDArray[np.intp]:
    """The likeliest tokens that together have ``top_p`` of all weight, at least one."""
    wanted = top_p * weights.sum(dtype=np.float64)
    likely = np.arange(len(weights))
    for count in LIKELY:
        if count < len(weights):
            some = np.argpartition(weights, -count)[-count:]
            if weights[some].sum(dtype=np.float64) >= wanted:
                likely = some
                break
    ordered = likely[np.argsort(-weights[likely], kind="stable")]
    steps = np.cumsum(weights[ordered], dtype=np.float64)
    return ordered[: int(np.searchsorted(steps, wanted)) + 1]

"""Choosing a token from logits: the best one on the device, a drawn one on the CPU.

Draws are made with NumPy because torch's kernels for them (sort, scan, scatter) would stay in a GPU process
as 0.25 GB of loaded code, which every snapshot carries; a draw from 150,000 tokens takes 2 to 4 ms here.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from dumont.errors import Internal
from model_host.engine import Generation

# Tokens among which a nucleus is looked for first: sorting all of a vocabulary takes ten times longer.
LIKELY: Final = (1024, 16384)

# Below it a draw is the best token anyway, and single precision ends.
SMALLEST_TEMPERATURE: Final = 1e-6

Floats = NDArray[np.float32]


class Chooser:
    """Picks tokens for one request: the best, or draws after temperature and top-p."""

    def __init__(self, request: Generation) -> None:
        self._request = request
        # Without a seed: the process's own generator, which is seeded anew when a restored process wakes.
        self._seeded = None if request.seed is None else np.random.default_rng(request.seed % 2**64)

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor) -> int:
        """
        Args:
            logits: shape (1, vocabulary).
        """
        if self._request.temperature == 0:
            return int(logits.argmax(-1).item())
        values: Floats = logits[0].float().cpu().numpy()
        best = values.max()
        if not np.isfinite(best):
            raise Internal("NOT_A_NUMBER", "the model computed no probabilities for the next token")
        # The best first, so that a tiny temperature does not make infinities of it.
        values = (values - best) / np.float32(max(self._request.temperature, SMALLEST_TEMPERATURE))
        chance = self._seeded.random() if self._seeded else np.random.random()
        top_p = self._request.top_p
        return draw(values, 1.0 if top_p is None else top_p, chance)


def draw(logits: Floats, top_p: float, chance: float) -> int:
    """A token drawn from the smallest set of tokens that has probability ``top_p``, the likeliest first.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, 2020.

    Args:
        logits: shape (vocabulary,).
        top_p: above 0 and at most 1.
        chance: uniform in [0, 1).
    """
    weights = np.exp(logits - logits.max(), dtype=np.float32)
    tokens = np.arange(len(weights)) if top_p == 1 else _nucleus(weights, top_p)
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

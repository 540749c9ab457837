"""Draws follow the model's probabilities, within the nucleus that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TopPLogitsWarper

from dumont.errors import Internal
from model_host.engines.sampling import LIKELY, Sampling, choose, draw

CHANCES = np.linspace(0, 1, 4001)[:-1]


def logits(size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), top_p=st.floats(0.05, 0.99), size=st.sampled_from([2, 50, 3 * LIKELY[0]]))
def test_only_tokens_of_the_nucleus_are_drawn(seed: int, top_p: float, size: int) -> None:
    values = logits(size, seed)

    drawn = {draw(values, chance, top_p=top_p) for chance in CHANCES}

    kept = TopPLogitsWarper(top_p)(None, torch.from_numpy(values)[None])[0]
    assert drawn <= set(torch.nonzero(torch.isfinite(kept))[:, 0].tolist())


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p: float) -> None:
    values = logits(12, seed=1, spread=1.0)
    warped = TopPLogitsWarper(top_p)(None, torch.from_numpy(values)[None])[0]
    expected = torch.softmax(warped, -1).numpy()

    drawn = np.bincount([draw(values, chance, top_p=top_p) for chance in CHANCES], minlength=12) / len(
        CHANCES
    )

    assert np.abs(drawn - expected).max() < 0.002


def test_a_flat_distribution_needs_more_than_the_likeliest_tokens() -> None:
    values = np.zeros(4 * LIKELY[0], dtype=np.float32)

    drawn = {draw(values, chance, top_p=0.9) for chance in CHANCES}

    assert len(drawn) > 3 * LIKELY[0] * 0.9


@pytest.mark.parametrize("temperature", [1e-39, 1e-9, 0.01])
def test_a_tiny_temperature_draws_the_best_token(temperature: float) -> None:
    values = np.array([1.0, 7.0, 6.0, -3.0], dtype=np.float32)
    sampling = Sampling(temperature=temperature)
    generator = np.random.default_rng(1)

    assert {choose(values, sampling, [], [], generator).token for _ in range(20)} == {1}


def test_what_is_no_number_is_never_a_token() -> None:
    with pytest.raises(Internal) as refusal:
        choose(np.array([1.0, np.nan, 2.0], dtype=np.float32), Sampling(temperature=1.0), [], [], None)
    assert refusal.value.reason == "NOT_A_NUMBER"


def test_a_certain_token_is_drawn_whatever_the_chance() -> None:
    values = np.full(100, -1e4, dtype=np.float32)
    values[42] = 0

    assert {draw(values, chance, top_p=top_p) for top_p in (0.01, 1.0) for chance in (0.0, 0.999999)} == {42}

"""Each field of a request does to the next token what a plain reference does, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dumont.errors import Internal
from model_host.engine import Generation
from model_host.engines.sampling import LIKELY, Floats, Sampling, adjust, choose, draw

CHANCES = np.linspace(0, 1, 1001)[:-1]


def logits(size: int, seed: int, spread: float = 3.0) -> Floats:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


# What the fields mean, one token at a time and in double precision.


def adjusted(
    values: Sequence[float], sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    found = []
    for token, value in enumerate(map(float, values)):
        if token in prompt or token in answer:
            value = value / sampling.repetition if value > 0 else value * sampling.repetition
        times = list(answer).count(token)
        value -= sampling.presence * (times > 0) + sampling.frequency * times
        if token in sampling.ends and len(answer) < sampling.min_new_tokens:
            value = -math.inf
        found.append(value + sampling.bias.get(token, 0.0))
    return found


def probabilities(values: Sequence[float], sampling: Sampling) -> list[float]:
    """Of every token, with those that are not drawn from at 0."""
    best = max(values)
    weights = [math.exp((value - best) / sampling.temperature) for value in values]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    whole = sum(weights[token] for token in order)
    nucleus: list[int] = []
    for token in order:
        if sum(weights[chosen] for chosen in nucleus) >= sampling.top_p * whole:
            break
        nucleus.append(token)
    drawn = [token for token in nucleus if weights[token] >= sampling.min_p]
    whole = sum(weights[token] for token in drawn)
    return [weights[token] / whole if token in drawn else 0.0 for token in range(len(weights))]


def frequencies(values: Floats, sampling: Sampling) -> NDArray[np.float64]:
    """How often each token is drawn, for chances spread evenly."""
    scaled = (values - values.max()) / np.float32(sampling.temperature)
    drawn = [
        draw(scaled, chance, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p)
        for chance in CHANCES
    ]
    return np.bincount(drawn, minlength=len(values)) / len(CHANCES)


SOME_TOKENS = st.lists(st.integers(0, 11), max_size=8)


@given(
    seed=st.integers(0, 999),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 2.0]),
    presence=st.sampled_from([0.0, -1.0, 1.5]),
    frequency=st.sampled_from([0.0, -0.5, 0.75]),
    bias=st.dictionaries(st.integers(0, 11), st.sampled_from([-100.0, -1.0, 2.5]), max_size=3),
    ends=st.frozensets(st.integers(0, 11), max_size=2),
    least=st.integers(0, 4),
    prompt=SOME_TOKENS,
    answer=SOME_TOKENS,
)
def test_penalties_and_biases_are_those_of_the_reference(
    seed: int,
    repetition: float,
    presence: float,
    frequency: float,
    bias: Mapping[int, float],
    ends: frozenset[int],
    least: int,
    prompt: list[int],
    answer: list[int],
) -> None:
    values = logits(12, seed)
    before = values.copy()
    sampling = Sampling(
        repetition=repetition, presence=presence, frequency=frequency, bias=bias, ends=ends,
        min_new_tokens=least,
    )  # fmt: skip
    expected = adjusted(values.tolist(), sampling, prompt, answer)

    np.testing.assert_allclose(adjust(values, sampling, prompt, answer), expected, rtol=1e-5, atol=1e-5)
    chosen = choose(values, sampling, prompt, answer, None).token
    assert expected[chosen] == pytest.approx(max(expected), abs=1e-4)
    np.testing.assert_array_equal(values, before)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 8, 50]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
)
def test_tokens_are_drawn_as_often_as_the_reference_says(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    values = logits(12, seed, spread=1.5)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    drawn = frequencies(values, sampling)

    assert np.abs(drawn - probabilities(values.tolist(), sampling)).max() < 0.004


@pytest.mark.parametrize(
    ("warper", "sampling"),
    [
        (TopKLogitsWarper(5), Sampling(temperature=1.0, top_k=5)),
        (TopPLogitsWarper(0.8), Sampling(temperature=1.0, top_p=0.8)),
        (MinPLogitsWarper(0.1), Sampling(temperature=1.0, min_p=0.1)),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_a_field_alone_means_what_it_does_in_transformers(warper: Any, sampling: Sampling) -> None:
    for seed in range(5):
        values = logits(40, seed)

        drawn = frequencies(values, sampling)

        kept = torch.softmax(warper(None, torch.from_numpy(values)[None])[0], -1).numpy()
        assert np.abs(drawn - kept).max() < 0.004


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    values, prompt, answer = logits(40, 1), [1, 2, 2, 3], [7, 3]

    found = adjust(values, Sampling(repetition=1.7), prompt, answer)

    penalised = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([prompt + answer]), torch.from_numpy(values)[None]
    )
    np.testing.assert_allclose(found, penalised[0].numpy(), rtol=1e-6)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), top_p=st.floats(0.05, 0.99), size=st.sampled_from([2, 50, 3 * LIKELY[0]]))
def test_only_tokens_of_the_nucleus_are_drawn(seed: int, top_p: float, size: int) -> None:
    values = logits(size, seed)

    drawn = {draw(values, chance, top_p=top_p) for chance in CHANCES}

    kept = TopPLogitsWarper(top_p)(None, torch.from_numpy(values)[None])[0]
    assert drawn <= set(torch.nonzero(torch.isfinite(kept))[:, 0].tolist())


def test_a_flat_distribution_needs_more_than_the_likeliest_tokens() -> None:
    values = np.zeros(4 * LIKELY[0], dtype=np.float32)

    drawn = {draw(values, chance, top_p=0.9) for chance in CHANCES}

    # All chances lead to tokens of their own: none of 0.9 of them is left out.
    assert len(drawn) == len(CHANCES)


@pytest.mark.parametrize("temperature", [1e-39, 1e-9, 0.01])
def test_a_tiny_temperature_draws_the_best_token(temperature: float) -> None:
    values = np.array([1.0, 7.0, 6.0, -3.0], dtype=np.float32)
    sampling = Sampling(temperature=temperature)
    generator = np.random.default_rng(1)

    assert {choose(values, sampling, [], [], generator).token for _ in range(20)} == {1}


def test_a_certain_token_is_drawn_whatever_the_chance() -> None:
    values = np.full(100, -1e4, dtype=np.float32)
    values[42] = 0

    drawn = {draw(values, chance, top_p=top_p) for top_p in (0.01, 1.0) for chance in (0.0, 0.999999)}

    assert drawn == {42}


def test_a_seed_repeats_and_another_does_not() -> None:
    values, sampling = logits(500, 2, spread=0.5), Sampling(temperature=1.0)

    def drawn(seed: int) -> list[int]:
        generator = np.random.default_rng(seed)
        return [choose(values, sampling, [], [], generator).token for _ in range(8)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_never_a_token(bad: float) -> None:
    values = np.array([1.0, bad, 2.0], dtype=np.float32)
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(repetition=2.0)):
        with pytest.raises(Internal) as refusal:
            choose(values, sampling, [0], [], None)
        assert refusal.value.reason == "NOT_A_NUMBER"


def test_log_probabilities_are_the_models_own_before_any_setting() -> None:
    values = logits(200, 3)
    plain = torch.log_softmax(torch.from_numpy(values).double(), -1)
    sampling = Sampling(temperature=1.5, repetition=1.5, bias={17: 50.0}, logprobs=5)

    chosen = choose(values, sampling, [1, 2], [3], np.random.default_rng(0))

    assert chosen.token == 17
    assert chosen.logprob == pytest.approx(float(plain[17]), abs=1e-4)
    likeliest = plain.topk(5)
    assert [token for token, _ in chosen.top] == likeliest.indices.tolist()
    assert [logprob for _, logprob in chosen.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(("asked", "reported"), [(None, False), (0, True)])
def test_log_probabilities_are_computed_only_when_asked_for(asked: int | None, reported: bool) -> None:
    chosen = choose(logits(50, 1), Sampling(logprobs=asked), [], [], None)

    assert (chosen.logprob != 0.0, chosen.top) == (reported, ())


def test_what_a_request_leaves_out_comes_from_the_model() -> None:
    defaults = {"top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05, "temperature": 0.6}

    left_out = Sampling.of(Generation(prompt="p"), defaults, frozenset())
    given = Sampling.of(
        Generation(prompt="p", temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0),
        defaults,
        frozenset(),
    )
    nothing = Sampling.of(Generation(prompt="p"), {"top_k": None}, frozenset())

    assert left_out == Sampling(top_p=0.8, top_k=20, min_p=0.05, repetition=1.05)
    assert given == Sampling(temperature=1.0)
    assert nothing == Sampling()

"""What the graphs' steps are told of each sequence; the graphs themselves need a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model_host.engines.batch import Chunk, TokenSequence
from model_host.engines.graphs import BIASES, MOST_BIASES, PLACE, ROWS, STATE_ROWS, Graphs
from model_host.engines.kv import Extent
from model_host.engines.sampling import Sampling

END, OTHER = 7, 9


@pytest.fixture
def graphs() -> Graphs:
    """Its buffers alone, on the CPU."""
    found: Any = object.__new__(Graphs)
    found._device, found._stream = torch.device("cpu"), None
    found._places, found._place = [0, 1], {}
    found._bias_tokens = torch.zeros(2, MOST_BIASES, dtype=torch.int32)
    found._bias_values = torch.zeros(2, MOST_BIASES)
    return found


def added(graphs: Graphs, sequence: TokenSequence) -> dict[int, float]:
    """What the next step adds to the sequence's logits."""
    state = np.zeros((STATE_ROWS, ROWS + 1), dtype=np.int32)
    graphs._fill(state, 0, Chunk(sequence, sequence.length - 1, 1, sampled=True))
    place, count = int(state[PLACE, 0]), int(state[BIASES, 0])
    tokens, values = graphs._bias_tokens[place, :count], graphs._bias_values[place, :count]
    return dict(zip(tokens.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("bias", [{}, {OTHER: 2.0}, {END: 5.0, OTHER: 2.0}])
def test_an_end_that_was_banned_at_first_has_its_own_bias_then(
    graphs: Graphs, bias: dict[int, float]
) -> None:
    # given: an answer that must have two tokens
    sampling = Sampling(temperature=1.0, bias=bias, ends=frozenset({END}), min_new_tokens=2)
    sequence = TokenSequence([1, 2], 9, sampling, sampling.ends, sampling.ends, seed=1)
    sequence.extent = Extent(16, 16)
    graphs.begin(sequence)

    # when it grows, then its end is banned for two tokens, and has the caller's bias from the third on
    for given in range(4):
        expected = bias if given >= 2 else {**bias, END: -np.inf}
        assert added(graphs, sequence) == expected, f"after {given} tokens"
        sequence.answer.append(3)

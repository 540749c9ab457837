"""Which tokens the next step computes, and how an answer grows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_host.engine import FinishReason
from model_host.engines.batch import Chunk, TokenSequence, plan
from model_host.engines.sampling import Sampling


def prompt(tokens: int, computed: int = 0) -> TokenSequence:
    """A sequence of whose prompt some tokens are computed."""
    return TokenSequence(list(range(tokens)), 10, Sampling(), computed=computed)


def answering(tokens: int = 8) -> TokenSequence:
    """A sequence whose last token waits to be computed."""
    return TokenSequence(list(range(tokens)), 10, Sampling(), answer=[5], computed=tokens)


def told(sequences: list[TokenSequence], chunks: list[Chunk]) -> list[tuple[int, int, int, bool]]:
    """Each chunk as: whose it is, its first token, how many, whether a token is chosen."""
    return [(sequences.index(c.sequence), c.first, c.count, c.sampled) for c in chunks]


ENDED = answering()
ENDED.ended = True

TABLE = {
    "nothing": ([], []),
    "a prompt that fits": ([prompt(7)], [(0, 0, 7, True)]),
    "a prompt of one token": ([prompt(1)], [(0, 0, 1, True)]),
    "alone, a prompt has all rows": ([prompt(100)], [(0, 0, 16, False)]),
    "a prompt goes on where it stopped": ([prompt(20, computed=16)], [(0, 16, 4, True)]),
    "answers": ([answering(), answering(3)], [(0, 8, 1, True), (1, 3, 1, True)]),
    "answers come first": ([prompt(3), answering()], [(1, 8, 1, True), (0, 0, 3, True)]),
    "beside answers, prompts have fewer rows": (
        [prompt(100), answering()],
        [(1, 8, 1, True), (0, 0, 4, False)],
    ),
    "prompts share rows in order": (
        [prompt(3), answering(), prompt(9)],
        [(1, 8, 1, True), (0, 0, 3, True), (2, 0, 1, False)],
    ),
    "alone, prompts share all rows in order": (
        [prompt(10), prompt(10)],
        [(0, 0, 10, True), (1, 0, 6, False)],
    ),
    "the last token of a prompt is like an answer's": (
        [prompt(20, computed=19), prompt(9)],
        [(0, 19, 1, True), (1, 0, 4, False)],
    ),
    "one that has ended": ([ENDED, answering()], [(1, 8, 1, True)]),
    "one whose tokens are all computed": ([prompt(5, computed=5), prompt(2)], [(1, 0, 2, True)]),
    "more answers than rows": (
        [answering() for _ in range(18)],
        [(number, 8, 1, True) for number in range(16)],
    ),
}


@pytest.mark.parametrize(("sequences", "expected"), TABLE.values(), ids=TABLE.keys())
def test_a_step_computes_answers_and_then_prompts(
    sequences: list[TokenSequence], expected: list[tuple[int, int, int, bool]]
) -> None:
    assert told(sequences, plan(sequences, rows=16, prompt_rows=4)) == expected


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    limit=st.integers(1, 5),
    prompt_rows=st.integers(1, 6),
)
def test_everyone_comes_to_the_end_of_their_answer(lengths: list[int], limit: int, prompt_rows: int) -> None:
    sequences = [TokenSequence([0] * length, limit, Sampling()) for length in lengths]

    steps = 0
    while not all(sequence.ended for sequence in sequences):
        running = [sequence for sequence in sequences if not sequence.ended]
        chunks = plan(running, rows=8 + prompt_rows, prompt_rows=prompt_rows)
        # No more rows than there may be, nobody twice, and everyone whose next token can be chosen gets one.
        assert sum(chunk.count for chunk in chunks) <= 8 + prompt_rows
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.first == chunk.sequence.computed
            chunk.sequence.computed += chunk.count
            if chunk.sampled:
                assert chunk.sequence.waiting == 0
                chunk.sequence.ended = chunk.sequence.take(1) is not None
        answers = [sequence for sequence in running if sequence.answer and not sequence.ended]
        assert all(sequence.waiting == 1 for sequence in answers)
        steps += 1

    assert steps <= sum(lengths) + len(lengths) * limit


@given(
    st.lists(st.integers(), max_size=9),
    st.lists(st.integers(), max_size=9),
    st.integers(0, 18),
    st.integers(0, 9),
)
def test_a_slice_is_that_of_prompt_and_answer_joined(
    prompt: list[int], answer: list[int], first: int, count: int
) -> None:
    sequence = TokenSequence(prompt, 10, Sampling(), answer=answer)

    assert sequence.slice(first, count) == (prompt + answer)[first : first + count]


def test_an_answer_ends_at_its_limit() -> None:
    sequence = TokenSequence([1, 2], 2, Sampling())

    assert [sequence.take(5), sequence.take(6)] == [None, FinishReason.LENGTH]
    assert sequence.answer == [5, 6]
    assert (sequence.length, sequence.most) == (4, 4)


@pytest.mark.parametrize(("end", "reason"), [(7, FinishReason.END), (8, FinishReason.STOP)])
def test_an_end_token_ends_the_answer_and_is_no_part_of_it(end: int, reason: FinishReason) -> None:
    sequence = TokenSequence([1], 9, Sampling(), ends=frozenset({7, 8}), own_ends=frozenset({7}))

    assert [sequence.take(5), sequence.take(end)] == [None, reason]
    assert sequence.answer == [5]


def test_an_end_token_before_the_least_length_is_a_token_like_any_other() -> None:
    sampling = Sampling(min_new_tokens=2)
    sequence = TokenSequence([1], 9, sampling, ends=frozenset({7}), own_ends=frozenset({7}))

    assert [sequence.take(7), sequence.take(7), sequence.take(7)] == [None, None, FinishReason.END]
    assert sequence.answer == [7, 7]


def test_tokens_in_the_cache_are_those_computed() -> None:
    sequence = TokenSequence([1, 2, 3], 9, Sampling(), answer=[4, 5], computed=4)

    assert sequence.tokens() == [1, 2, 3, 4]
    assert sequence.waiting == 1

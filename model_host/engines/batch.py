"""Sequences that are computed together, and which of their tokens the next step computes. Pure decisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model_host.engine import FinishReason
from model_host.engines.kv import Extent
from model_host.engines.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np


@dataclass(eq=False)
class TokenSequence:
    """One answer in the making.

    Attributes:
        prompt: its tokens.
        limit: the most tokens that the answer may have.
        ends: tokens that end it and are not part of it.
        own_ends: those of them that are the model's own end marks.
        seed: of the draws; None: they come from the process's own generator.
        answer: tokens so far.
        computed: how many tokens of prompt and answer have their keys and values in the cache.
        cached: how many of them another sequence had computed.
        extent: where they lie; None while it has no room.
        generator: draws on the CPU.
        followers: others of the same prompt, which wait for it to be computed here.
        follows: whether it is such a follower.
        paused: whether it waits for room, after others needed its own.
    """

    prompt: list[int]
    limit: int
    sampling: Sampling
    ends: frozenset[int] = frozenset()
    own_ends: frozenset[int] = frozenset()
    seed: int | None = None
    answer: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    extent: Extent | None = None
    generator: np.random.Generator | None = None
    ended: bool = False
    followers: tuple[TokenSequence, ...] = ()
    follows: bool = False
    paused: bool = False

    @property
    def length(self) -> int:
        """Tokens known, of prompt and answer."""
        return len(self.prompt) + len(self.answer)

    @property
    def most(self) -> int:
        """Tokens of prompt and answer that may need room in the cache."""
        return len(self.prompt) + self.limit

    @property
    def waiting(self) -> int:
        """Tokens known and not computed."""
        return self.length - self.computed

    def slice(self, first: int, count: int) -> list[int]:
        """``count`` of its tokens from ``first`` on."""
        prompt = len(self.prompt)
        if first >= prompt:
            return self.answer[first - prompt : first - prompt + count]
        return (self.prompt[first : first + count] + self.answer[: max(first + count - prompt, 0)])[:count]

    def tokens(self) -> list[int]:
        """All of its tokens whose keys and values are in the cache."""
        return self.slice(0, self.computed)

    def take(self, token: int) -> FinishReason | None:
        """Add a token, unless it ends the answer. Returns why the answer has ended, or None if it goes on."""
        if token in self.ends and len(self.answer) >= self.sampling.min_new_tokens:
            return FinishReason.END if token in self.own_ends else FinishReason.STOP
        self.answer.append(token)
        return FinishReason.LENGTH if len(self.answer) >= self.limit else None


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that a step computes.

    Attributes:
        first: the position of the first of them.
        sampled: whether a token is chosen after the last of them.
    """

    sequence: TokenSequence
    first: int
    count: int
    sampled: bool


def plan(sequences: Iterable[TokenSequence], rows: int, prompt_rows: int) -> list[Chunk]:
    """What the next step computes: the next token of every answer, then prompts in the order given.

    Args:
        rows: tokens that a step may have.
        prompt_rows: tokens of prompts that it may have while answers wait for it, so that a long prompt holds
            nobody up; without answers all rows are for prompts.
    """
    chunks: list[Chunk] = []
    prompts: list[TokenSequence] = []
    for sequence in sequences:
        if sequence.ended or sequence.follows or sequence.paused or sequence.waiting == 0:
            continue
        if sequence.waiting == 1 and len(chunks) < rows:
            chunks.append(Chunk(sequence, sequence.computed, 1, sampled=True))
        else:
            prompts.append(sequence)
    left = min(rows - len(chunks), prompt_rows) if chunks else rows
    for sequence in prompts:
        if left == 0:
            break
        count = min(sequence.waiting, left)
        chunks.append(Chunk(sequence, sequence.computed, count, sampled=count == sequence.waiting))
        left -= count
    return chunks

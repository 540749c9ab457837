"""The port behind which every inference engine lives, and the facts that cross it.

Its life: ``load`` brings the model in; ``warm_up`` runs every path once with synthetic input, so that nothing
is left to import, compile or allocate lazily; ``canary`` records what the model says to a fixed input. Then
requests come. ``generate`` or ``embed`` checks one on the caller's thread and returns the work it asks for.
Everything after that happens on the host's one computing thread: ``admit`` takes work in while other work is
under way, each ``step`` advances all that was admitted, and ``drop`` ends one at any time without touching
the others. Between ``pause`` and ``resume`` the process may come to another GPU, with all that was admitted.
``quiesce`` releases what a snapshot must not hold, when nothing is admitted; after ``wake`` the engine is as
it was and ``canary`` must return the same tokens again.

An example, two requests of which the second is cancelled::

    first, second = engine.generate(a), engine.generate(b)
    engine.admit(first), engine.admit(second)
    engine.step()       # [Output(first, Token(…)), Output(second, Token(…))]
    engine.drop(second)
    engine.step()       # [Output(first, Token(…)), Output(first, End(…), last=True)]
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, Protocol

DEFAULT_MAX_NEW_TOKENS: Final = 256


class DeviceLost(Exception):
    """This process can use its device no more; only another one can."""


class FinishReason(Enum):
    """Why a token stream ended."""

    END = "end"  # the model ended its answer
    LENGTH = "length"  # max_new_tokens or the context was used up
    STOP = "stop"  # a stop string or stop token came up


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Generation:
    """A request for text: either ``prompt`` or ``messages``.

    A setting that is None is as in the model's ``generation_config.json``, or has no effect if that lacks it.

    Args:
        max_new_tokens: of each answer; 0 means 256.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with this probability is drawn from.
        seed: makes the draws repeatable; without it they differ each time. Answer ``i`` of ``n`` is drawn as
            with ``seed + i``.
        stop: strings that end the answer; the text before them is the answer.
        top_k: this many of the likeliest tokens are drawn from; 0: all.
        min_p: tokens less likely than this fraction of the likeliest are not drawn; 0: all are.
        repetition_penalty: divides the positive logits of tokens that are in the prompt or the answer, and
            multiplies their negative ones; 1 changes nothing.
        presence_penalty: subtracted from the logits of tokens that are in the answer.
        frequency_penalty: the same, once for each time that the token is in the answer.
        logit_bias: added to logits, by token.
        stop_token_ids: tokens that end the answer; they are not part of it.
        ignore_eos: go on to ``max_new_tokens`` even where the model would end its answer.
        min_new_tokens: no token ends the answer before it has this many.
        logprobs: report the log-probability of each token, and of this many of the likeliest at its
            position; None: report none.
        n: how many answers.
    """

    prompt: str = ""
    messages: tuple[Message, ...] = ()
    max_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None
    n: int = 1


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at a position of the answer; ``text`` is the token by itself."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, before any sampling setting; ``top`` has the likeliest first."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of answer ``index`` of ``n``.

    ``logprobs`` has one entry for each of ``token_ids`` if the request asked for them.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of answer ``index``; a stream ends when the last of its answers does.

    ``output_tokens`` leaves out the model's own end mark. ``cached_prompt_tokens`` counts those of
    ``prompt_tokens`` that were already computed for an earlier request.
    """

    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    index: int = 0
    cached_prompt_tokens: int = 0


@dataclass(frozen=True)
class Embedded:
    """Embeddings of some inputs, in their order.

    Attributes:
        first: the index of the first of them among all inputs.
    """

    embeddings: list[list[float]]
    prompt_tokens: int
    first: int = 0


@dataclass(frozen=True)
class Reply:
    """What a caller is sent now.

    Attributes:
        ended: the caller has all it asked for, whatever else was computed.
    """

    items: Sequence[Any] = ()
    ended: bool = False


class Work(Protocol):
    """One request, already checked. What it holds while admitted is the engine's business."""

    def receive(self, computed: Sequence[Any]) -> Reply:
        """Turn what steps have yielded into what the caller is sent. Runs on the caller's thread.

        Args:
            computed: the items of this work's outputs since the last call, in order.
        """


@dataclass(frozen=True)
class Output:
    """What a step has computed for one work.

    Attributes:
        item: for ``Work.receive``; an exception ends the work and is raised to its caller.
        last: nothing more will come, and the engine holds nothing for this work any more.
    """

    work: Work
    item: Any
    last: bool = False


@dataclass(frozen=True)
class Capacity:
    """How much an engine takes at a time.

    Attributes:
        sequences: how many answers are computed together.
        kv_tokens: how many tokens of prompts and answers there is room for; None where nothing is cached.
        unbatched_reason: why answers are computed one after the other after all; empty if they are not.
    """

    sequences: int
    kv_tokens: int | None = None
    unbatched_reason: str = ""


@dataclass(frozen=True)
class Load:
    """How much of an engine's capacity is in use."""

    sequences: int = 0
    kv_tokens: int = 0


@dataclass(frozen=True)
class Canary:
    """What the model says to a fixed input: greedy tokens and the log-probability of the last."""

    tokens: list[int]
    logprob: float


class WeightsPlace(Enum):
    """Where the weights are while the process is captured."""

    DETACHED = "detached"  # in the files that it maps: a snapshot does not carry them
    INCLUDED = "included"  # in its own memory: a snapshot carries them and no file is needed


@dataclass(frozen=True)
class Settings:
    """How to load and limit an engine.

    Args:
        device: ``auto``, ``cpu`` or ``cuda:N``.
        weights: whether parameters are made as mapped files or as memory of their own; never changes later.
        weight_files: where a weight file is to be mapped from, by its name; others from the model directory.
        max_new_tokens_limit: the most a caller may ask for.
        threads: compute threads; None leaves the library's choice.
        loader: socket of the node's loader of weights; None: there is none.
        gpu: UUID of the GPU that ``device`` names; the loader knows it by that.
        kv_cache: bytes for the keys and values of all requests together; None: the engine's choice.
        engine_options: arguments of the engine by their own names, already checked.
    """

    device: str = "auto"
    weights: WeightsPlace = WeightsPlace.DETACHED
    weight_files: Mapping[str, Path] = field(default_factory=dict)
    max_new_tokens_limit: int = 4096
    threads: int | None = None
    loader: Path | None = None
    gpu: str = ""
    kv_cache: int | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Phases:
    """The named steps of a start and their seconds, in order."""

    seconds: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.append((name, round(time.perf_counter() - start, 4)))


class Engine(Protocol):
    """One model, ready to compute. Raises DumontError subclasses for everything that a caller can fix."""

    name: str
    device: str
    context_length: int
    capacity: Capacity

    @property
    def load(self) -> Load:
        """What is in use now."""

    def warm_up(self) -> None:
        """Run every path once with synthetic input."""

    def canary(self) -> Canary:
        """What the model says to a fixed input, computed as requests are: every layer, and the cache."""

    def generate(self, request: Generation) -> Work:
        """Check a request and tokenise its prompt. Runs on the caller's thread and holds nothing.

        Raises:
            InvalidArgument: the request is wrong; the field is named.
            FailedPrecondition: this engine or model cannot do it.
        """

    def embed(self, inputs: Sequence[str]) -> Work:
        """Check and tokenise texts. Runs on the caller's thread and holds nothing.

        Raises:
            InvalidArgument: the inputs are wrong.
            FailedPrecondition: this engine cannot embed.
        """

    def admit(self, work: Work) -> bool:
        """Let work take part from the next step on; False: there is no room for it now."""

    def drop(self, work: Work) -> None:
        """End work that was admitted, and give back what it holds; nothing if it has ended already."""

    def step(self) -> Sequence[Output]:
        """Advance everything admitted. An error in one work is that work's last output.

        Raises:
            DeviceLost: nothing more will be computed in this process.
        """

    def quiesce(self) -> None:
        """Release what a snapshot must not hold: weights on a GPU, caches, everything of past requests."""

    def pause(self) -> None:
        """Stop between two steps so that the GPU can be taken away and given back, this one or another.

        Unlike after ``quiesce``, what was admitted stays, and goes on after ``resume``.

        Raises:
            FailedPrecondition: NOT_PAUSABLE; nothing has changed.
        """

    def resume(self) -> None:
        """Undo ``pause``."""

    def order_weights(self, loader: Path, gpu: str) -> None:
        """Let the node's loader begin to bring the weights for ``wake``; uses no GPU.

        Args:
            loader: the loader's socket.
            gpu: UUID of the GPU that they must be on.
        """

    def wake(self) -> None:
        """Undo ``quiesce``."""

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that compute, by name."""

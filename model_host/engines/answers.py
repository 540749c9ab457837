"""Requests for text turned into tokens, and the tokens of answers turned into text.

Shared by the engines that generate: whichever of them computes, a prompt has the same tokens and an answer
the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final

from dumont import generation_config, limits
from dumont.errors import InvalidArgument
from model_host.engine import (
    DEFAULT_MAX_NEW_TOKENS,
    Finish,
    FinishReason,
    Generation,
    Message,
    Piece,
    Reply,
    TokenLogprob,
    TopLogprob,
)
from model_host.engines.batch import TokenSequence
from model_host.engines.sampling import Chosen, Sampling
from model_host.engines.tokens import ChatTemplate, special_tokens
from model_host.model_files import Json, ModelFiles
from model_host.text import Detokenizer, StopFilter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A text that has more than this for each token of the context is counted in pieces first.
CHARACTERS_PER_TOKEN: Final = 16
COUNTED_CHARACTERS: Final = 1 << 16


class TextRequests:
    """Checks requests for text and tokenises their prompts, as one model needs it.

    Args:
        vocabulary: how many tokens the model has.
        context_length: tokens of a prompt and its answer together.
        max_new_tokens_limit: the most tokens that a caller may ask for.
    """

    def __init__(
        self,
        files: ModelFiles,
        tokenizer: Tokenizer,
        vocabulary: int,
        context_length: int,
        max_new_tokens_limit: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._template = ChatTemplate(files)
        self._defaults = generation_config.read(str(files.folder), files.config, files.generation)
        # Some ban tokens that their vocabulary has no longer.
        self._banned = frozenset(token for token in self._defaults.banned if 0 <= token < vocabulary)
        self._ends = end_tokens(files.generation or {}, files.config)
        self._vocabulary = vocabulary
        self._context_length = context_length
        self._max_new_tokens_limit = max_new_tokens_limit

    def read(self, request: Generation) -> Answering:
        """Check a request and tokenise its prompt.

        Raises:
            InvalidArgument: reasons of ``limits.check_generate``, INVALID_TOKEN_ID, EMPTY_PROMPT,
                PROMPT_TOO_LONG, INVALID_MESSAGES.
            FailedPrecondition: NO_CHAT_TEMPLATE, CHAT_TEMPLATE_LIMIT.
        """
        self._check(request)
        if request.messages:
            field = "messages"
            prompt = self._template.render(request.messages)
        else:
            field, prompt = "prompt", request.prompt
        self._check_length(prompt, field)
        # A rendered conversation carries the special tokens itself.
        tokens = self._tokenizer.encode(prompt, add_special_tokens=not request.messages).ids
        if not tokens:
            raise InvalidArgument("EMPTY_PROMPT", f"{field} holds no tokens", field=field)
        room = self._context_length - len(tokens)
        if room < 1:
            raise self._too_long(field, f"{len(tokens)}", len(tokens))
        return self.answering(request, tokens, min(request.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, room))

    def _check_length(self, text: str, field: str) -> None:
        """Refuse what is far too long before it is tokenised as a whole: a MB takes a second and 100 MB."""
        if len(text) <= self._context_length * CHARACTERS_PER_TOKEN:
            return
        count = 0
        for start in range(0, len(text), COUNTED_CHARACTERS):
            piece = text[start : start + COUNTED_CHARACTERS]
            count += len(self._tokenizer.encode(piece, add_special_tokens=False).ids)
            # Pieces may have a few more tokens than the whole, never twice as many.
            if count > 2 * self._context_length:
                raise self._too_long(field, f"more than {count // 2}", count // 2)

    def _too_long(self, field: str, tokens: str, count: int) -> InvalidArgument:
        return InvalidArgument(
            "PROMPT_TOO_LONG",
            f"{field} has {tokens} tokens; with an answer of at least one, this instance takes "
            f"{self._context_length}. Shorten it.",
            field=field,
            metadata={"tokens": str(count), "context_length": str(self._context_length)},
        )

    def answering(self, request: Generation, prompt: list[int], limit: int) -> Answering:
        """The work of a request whose prompt is tokenised.

        Args:
            limit: the most tokens of each answer.
        """
        own = frozenset() if request.ignore_eos else self._ends
        ends = own | frozenset(request.stop_token_ids)
        least = max(request.min_new_tokens, self._defaults.least(len(prompt)))
        request = replace(
            request, stop=(*request.stop, *self._defaults.stop), min_new_tokens=min(least, limit)
        )
        sampling = Sampling.of(request, self._defaults.fields, ends, self._banned)
        sequences = [
            TokenSequence(
                prompt, limit, sampling, ends, own, None if request.seed is None else request.seed + index
            )
            for index in range(request.n)
        ]
        return Answering(self._tokenizer, request, sequences, self._special)

    def synthetic(self) -> list[Answering]:
        """Work for a warm-up, which takes the paths of real requests: the chat template and the tokenizer, a
        drawn answer and greedy ones, penalties, biases and log-probabilities.
        """
        text = "Hello"
        if self._template:
            text = self._template.render([Message("user", text)])
        tokens = self._tokenizer.encode(text).ids[: self._context_length // 2] or [0]
        drawn = Generation(temperature=1.0, top_p=0.9, seed=0, stop=("\n\n",))
        altered = Generation(repetition_penalty=1.1, logprobs=1, logit_bias={0: 1.0})
        return [
            self.answering(drawn, tokens, 2),
            self.answering(altered, tokens[:4], 2),
            self.answering(Generation(), tokens[:2], 3),
        ]

    def _check(self, request: Generation) -> None:
        asked = {known.name: getattr(request, known.name) for known in fields(request)}
        asked["max_new_tokens"] = request.max_new_tokens or None
        limits.check_generate(asked, self._max_new_tokens_limit)
        for name, tokens in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
            if wrong := [token for token in tokens if token >= self._vocabulary]:
                raise InvalidArgument(
                    "INVALID_TOKEN_ID",
                    f"{name} names token {wrong[0]}; this model has {self._vocabulary} tokens",
                    field=name,
                )


@dataclass(frozen=True)
class Step:
    """What a step has computed for one answer: a token, its end, or both."""

    index: int
    chosen: Chosen | None = None
    reason: FinishReason | None = None


class Answering:
    """A request for text: the sequences to compute, and the text made of their tokens for the caller.

    The text that answers a prompt goes on where the prompt ends. The text that answers a conversation begins
    anew, without the space that a tokenizer may put before each word.

    Args:
        special: tokens that are not text, and how they are written in stop strings.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Generation,
        sequences: Sequence[TokenSequence],
        special: Mapping[int, str],
    ) -> None:
        self.sequences = sequences
        self._tokenizer = tokenizer
        self._wants_logprobs = request.logprobs is not None
        self._texts = [
            _Text(tokenizer, request.stop, special, () if request.messages else sequence.prompt)
            for sequence in sequences
        ]

    def receive(self, computed: Sequence[Step]) -> Reply:
        """Join the tokens of several steps into one piece for each answer."""
        items: list[Piece | Finish] = []
        for index in sorted({step.index for step in computed}):
            text = self._texts[index]
            if not text.ended:
                items += self._advance(index, text, [step for step in computed if step.index == index])
        return Reply(items, ended=all(text.ended for text in self._texts))

    def _advance(self, index: int, text: _Text, steps: Sequence[Step]) -> list[Piece | Finish]:
        sequence = self.sequences[index]
        ready, reason = "", None
        if text.stop:
            for step in steps:
                if step.chosen is not None:
                    ready += text.push(step.chosen)
                    if text.stopped:
                        reason = FinishReason.STOP
                        break
                reason = step.reason
        else:
            # Decoded together, which takes as long as a single one.
            ready = text.push(*(step.chosen for step in steps if step.chosen is not None))
            reason = steps[-1].reason
        if reason is not None:
            ready += text.flush()
            if text.stopped:
                reason = FinishReason.STOP
        items: list[Piece | Finish] = []
        if ready or (reason is not None and text.pending):
            logprobs = tuple(map(self._logprob, text.pending)) if self._wants_logprobs else ()
            items.append(Piece(ready, tuple(chosen.token for chosen in text.pending), index, logprobs))
            text.pending.clear()
        if reason is not None:
            text.ended = True
            items.append(
                Finish(reason, len(sequence.prompt), text.count, index, cached_prompt_tokens=sequence.cached)
            )
        return items

    def _logprob(self, chosen: Chosen) -> TokenLogprob:
        top = tuple(TopLogprob(token, self._alone(token), logprob) for token, logprob in chosen.top)
        return TokenLogprob(chosen.token, self._alone(chosen.token), chosen.logprob, top)

    def _alone(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)


@dataclass
class _Text:
    """The text of one answer. Its pieces, joined, are the text; their tokens are those counted as output.

    Attributes:
        before: the tokens that it continues.
    """

    tokenizer: Tokenizer
    stop: tuple[str, ...]
    special: Mapping[int, str]
    before: Sequence[int]
    pending: list[Chosen] = field(default_factory=list)
    count: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        self._text = Detokenizer(
            lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True), self.before
        )
        self._stops = StopFilter(self.stop)

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, *chosen: Chosen) -> str:
        """The text that tokens complete; with stop strings, one token at a time."""
        self.count += len(chosen)
        self.pending += chosen
        ready = self._stops.push(self._text.push(*(one.token for one in chosen)))
        if not self.stop:
            return ready
        [one] = chosen
        return ready + self._stops.push(self.special.get(one.token, ""), shown=False)

    def flush(self) -> str:
        return self._stops.push(self._text.flush()) + self._stops.flush()


def end_tokens(generation: Json, config: Json) -> frozenset[int]:
    """The tokens with which the model itself ends an answer."""
    for source in (generation, config):
        ends = source.get("eos_token_id")
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()

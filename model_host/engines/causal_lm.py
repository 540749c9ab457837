"""Text generation with a transformers causal language model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch

from dumont.errors import FailedPrecondition, InvalidArgument
from model_host.engine import (
    DEFAULT_MAX_NEW_TOKENS,
    Canary,
    Embedded,
    Finish,
    FinishReason,
    Generation,
    Message,
    Phases,
    Piece,
    Settings,
    Work,
)
from model_host.engines.assembly import build
from model_host.engines.libraries import library_versions
from model_host.engines.sampling import Chooser
from model_host.engines.tokens import ChatTemplate, load_tokenizer
from model_host.model_files import Json, ModelFiles
from model_host.text import Detokenizer, StopFilter
from model_host.weights import Weights, Workspace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CANARY_TOKENS: Final = 16
WARM_UP_LENGTHS: Final = (1, 5, 64, 256)
PREFILL_TOKENS: Final = 512  # computed at once; between chunks a call can be stopped
MAX_STOPS: Final = 16
DEFAULT_CONTEXT: Final = 2048


def load(files: ModelFiles, settings: Settings, phases: Phases) -> CausalLM:
    """Load a model for text generation. Errors as in ``assembly.build`` and ``load_tokenizer``."""
    with phases.measure("load_tokenizer"):
        tokenizer = load_tokenizer(files)
    model, weights = build(files, settings, phases)
    return CausalLM(model, weights, tokenizer, files, settings)


class CausalLM:
    """An ``Engine`` that generates."""

    name = "causal_lm"

    def __init__(
        self, model: Any, weights: Weights, tokenizer: Tokenizer, files: ModelFiles, settings: Settings
    ) -> None:
        self._model = model
        self._weights = weights
        self._tokenizer = tokenizer
        self._template = ChatTemplate(files)
        self._max_new_tokens_limit = settings.max_new_tokens_limit
        self._device = next(model.parameters()).device
        self._workspace = Workspace(self._device)
        self._ends = _end_tokens(files.generation, files.config)
        text_config = model.config.get_text_config()
        self._vocabulary = int(text_config.vocab_size)
        self.context_length = int(getattr(text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT)
        self.device = str(self._device)
        takes = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in takes

    def warm_up(self) -> None:
        """Prefill and steps, drawing and greedy; the chat template and the tokenizer both ways.

        On a GPU also prompts of other lengths: for each the libraries choose kernels, and load them then.
        """
        if self._device.type == "cuda":
            for length in WARM_UP_LENGTHS:
                prompt = [0] * min(length, self.context_length // 2)
                for _ in self._answer(Generation(), prompt, max_new_tokens=4):
                    pass
        text = "Hello"
        if self._template:
            text = self._template.render([Message("user", text)])
        tokens = self._tokenizer.encode(text).ids[: self.context_length // 2] or [0]
        request = Generation(temperature=1.0, top_p=0.9, seed=0, stop=("\n\n",))
        for _ in self._answer(request, tokens, max_new_tokens=3):
            pass

    @torch.inference_mode()
    def canary(self) -> Canary:
        """The greedy token at each of 16 positions of a fixed input: one pass that checks every layer."""
        fixed = [(7919 * (position + 1)) % self._vocabulary for position in range(CANARY_TOKENS)]
        logits = self._model(input_ids=self._tensor(fixed), use_cache=False).logits[0].float()
        best = logits.argmax(-1).cpu()
        # On the CPU: one kernel less that every GPU process would carry.
        logprob = torch.log_softmax(logits[-1].cpu(), -1)[best[-1]]
        return Canary([int(token) for token in best.tolist()], round(float(logprob), 4))

    def generate(self, request: Generation) -> Work[Piece | Finish]:
        """As the port says. Reasons: EMPTY_PROMPT, PROMPT_AND_MESSAGES, PROMPT_TOO_LONG, TOO_MANY_TOKENS,
        INVALID_MAX_NEW_TOKENS, INVALID_TEMPERATURE, INVALID_TOP_P, INVALID_STOP, INVALID_MESSAGES,
        NO_CHAT_TEMPLATE.
        """
        self._check(request)
        if request.messages:
            field = "messages"
            prompt = self._template.render(request.messages)
        else:
            field, prompt = "prompt", request.prompt
        # A rendered conversation carries the special tokens itself.
        tokens = self._tokenizer.encode(prompt, add_special_tokens=not request.messages).ids
        if not tokens:
            raise InvalidArgument("EMPTY_PROMPT", f"{field} holds no tokens", field=field)
        room = self.context_length - len(tokens)
        if room < 1:
            raise InvalidArgument(
                "PROMPT_TOO_LONG",
                f"{field} has {len(tokens)} tokens; with an answer of at least one, this model's context "
                f"takes {self.context_length}. Shorten it.",
                field=field,
                metadata={"tokens": str(len(tokens)), "context_length": str(self.context_length)},
            )
        limit = min(request.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, room)
        return partial(self._answer, request, tokens, limit)

    def _check(self, request: Generation) -> None:
        if request.prompt and request.messages:
            _refuse("PROMPT_AND_MESSAGES", "prompt", "send either prompt or messages, not both")
        if not request.prompt and not request.messages:
            _refuse("EMPTY_PROMPT", "prompt", "prompt is empty")
        if request.max_new_tokens < 0:
            _refuse("INVALID_MAX_NEW_TOKENS", "max_new_tokens", "max_new_tokens must not be negative")
        if request.max_new_tokens > self._max_new_tokens_limit:
            raise InvalidArgument(
                "TOO_MANY_TOKENS",
                f"max_new_tokens is {request.max_new_tokens}; at most {self._max_new_tokens_limit} are given",
                field="max_new_tokens",
                metadata={"limit": str(self._max_new_tokens_limit)},
            )
        if not (math.isfinite(request.temperature) and request.temperature >= 0):
            _refuse("INVALID_TEMPERATURE", "temperature", "temperature must be 0 or more")
        if request.top_p is not None and not 0 < request.top_p <= 1:
            _refuse("INVALID_TOP_P", "top_p", "top_p must be above 0 and at most 1")
        if not all(request.stop) or len(request.stop) > MAX_STOPS:
            _refuse("INVALID_STOP", "stop", f"stop takes at most {MAX_STOPS} strings, none of them empty")

    def _answer(
        self, request: Generation, prompt: list[int], max_new_tokens: int
    ) -> Iterator[Piece | Finish]:
        """Pieces joined are the text; their tokens are those counted as output."""
        text = Detokenizer(lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True))
        stops = StopFilter(request.stop)
        reason = FinishReason.LENGTH
        pending: list[int] = []
        count = 0
        for token in self._tokens(request, prompt, max_new_tokens):
            if token is None:
                yield Piece()
                continue
            if token in self._ends:
                reason = FinishReason.END
                break
            count += 1
            pending.append(token)
            if ready := stops.push(text.push(token)):
                yield Piece(ready, tuple(pending))
                pending.clear()
            else:
                yield Piece()
            if stops.stopped:
                break
        rest = stops.push(text.flush()) + stops.flush()
        if rest or pending:
            yield Piece(rest, tuple(pending))
        if stops.stopped:
            reason = FinishReason.STOP
        yield Finish(reason, prompt_tokens=len(prompt), output_tokens=count)

    def _tokens(self, request: Generation, ids: list[int], max_new_tokens: int) -> Iterator[int | None]:
        """Each new token; None after a chunk of the prompt. A token is computed only when it is asked for."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self._model.config)
        choose = Chooser(request)
        last = (len(ids) - 1) // PREFILL_TOKENS * PREFILL_TOKENS
        for start in range(0, last, PREFILL_TOKENS):
            self._step(ids[start : start + PREFILL_TOKENS], cache)
            yield None
        ids = ids[last:]
        for _ in range(max_new_tokens):
            token = choose(self._step(ids, cache))
            yield token
            ids = [token]

    @torch.inference_mode()
    def _step(self, ids: list[int], cache: Any) -> torch.Tensor:
        """The logits after ``ids``, one row; ``cache`` takes their keys and values."""
        options: dict[str, Any] = {}
        if self._keeps_logits and len(ids) > 1:
            # As an index, which selects a compact copy. A count would leave a strided view, for which torch
            # 2.13 on the CPU copies the whole output matrix: 130 ms for a vocabulary of 49,152.
            on_cpu = self._device.type == "cpu"
            options["logits_to_keep"] = torch.tensor([len(ids) - 1]) if on_cpu else 1
        output = self._model(input_ids=self._tensor(ids), past_key_values=cache, use_cache=True, **options)
        logits: torch.Tensor = output.logits[:, -1, :]
        return logits

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self._device)

    def embed(self, inputs: Sequence[str]) -> Work[Embedded]:
        raise FailedPrecondition(
            "ENGINE_CANNOT_EMBED", "This instance generates text; deploy an embedding model for embeddings."
        )

    def quiesce(self) -> None:
        """Free the GPU of weights and caches; on the CPU there is nothing to free."""
        self._weights.detach()
        self._workspace.release()

    def order_weights(self, loader: Path, gpu: str) -> None:
        self._weights.order(loader, gpu)

    def wake(self) -> None:
        self._workspace.regain()
        self._weights.attach()

    def versions(self) -> dict[str, str]:
        return library_versions()


def _end_tokens(generation: Json, config: Json) -> frozenset[int]:
    for source in (generation, config):
        ends = source.get("eos_token_id")
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()


def _refuse(reason: str, field: str, message: str) -> NoReturn:
    raise InvalidArgument(reason, message, field=field)

"""Sentence embeddings with a transformers model, as its model directory describes them."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from dumont.errors import FailedPrecondition, Internal
from model_host.engine import (
    Canary,
    Capacity,
    Embedded,
    Generation,
    Load,
    Output,
    Phases,
    Reply,
    Settings,
    Work,
)
from model_host.engines import sentence
from model_host.engines.assembly import build, positions
from model_host.engines.libraries import library_versions
from model_host.engines.sentence import Recipe
from model_host.engines.tokens import encode_inputs, load_tokenizer, lower_case, prompt_tokens
from model_host.model_files import ModelFiles
from model_host.weights import Weights, Workspace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

BATCH: Final = 16
SEQUENCES: Final = 64
CANARY_TOKENS: Final = 16
CANARY_VALUES: Final = 8
DEFAULT_CONTEXT: Final = 512
# Lengths of the two texts with which padding is checked, and how far the vector of the first may change by
# it, as a fraction of its length.
CHECKED: Final = (3, 11)
TOLERANCE: Final = 1e-3
ROUGH_TOLERANCE: Final = 0.05


def load(files: ModelFiles, settings: Settings, phases: Phases) -> Embedding:
    """Load a model for embeddings.

    Errors as in ``sentence.read``, ``assembly.build`` and ``load_tokenizer``.
    """
    recipe = sentence.read(files)
    with phases.measure("load_tokenizer"):
        tokenizer = load_tokenizer(files)
        if recipe.lower:
            lower_case(tokenizer)
    # What makes one vector of a text's is in the recipe; a head of the model's own would not be used.
    model, weights = build(
        files, settings, phases, architecture=sentence.architecture(files), dispensable=("pooler.",)
    )
    longest = recipe.longest or files.tokenizer_config.get("model_max_length")
    engine = Embedding(model, weights, tokenizer, recipe, longest if isinstance(longest, int) else None)
    with phases.measure("check_batching"):
        engine.check_batching()
    return engine


@dataclass(eq=False)
class Texts:
    """A request for embeddings: the tokens of its texts.

    Attributes:
        next: the index of the first text that no step has computed.
    """

    tokens: Sequence[list[int]]
    next: int = 0

    def receive(self, computed: Sequence[Embedded]) -> Reply:
        """Pass on what was computed."""
        return Reply(computed)


class Embedding:
    """An ``Engine`` that embeds. A step computes texts of all callers, those that came first first.

    Args:
        recipe: how texts become vectors.
        longest: tokens that a text may have, where the model directory says so.
    """

    name = "embedding"

    def __init__(
        self,
        model: Any,
        weights: Weights,
        tokenizer: Tokenizer,
        recipe: Recipe = Recipe(),  # noqa: B008  (it is immutable)
        longest: int | None = None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._unpooled = 0 if recipe.prompt_counts else prompt_tokens(tokenizer, recipe.prompt)
        self._pads = True
        self._values = 0
        self._device = next(model.parameters()).device
        self._workspace = Workspace(self._device)
        self._vocabulary = int(model.config.vocab_size)
        self._pad = int(getattr(model.config, "pad_token_id", None) or 0)
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        limits_known = [limit for limit in (positions(model), longest) if limit]
        self.context_length = min(limits_known, default=DEFAULT_CONTEXT)
        self.device = str(self._device)
        self.capacity = Capacity(SEQUENCES)
        self._running: list[Texts] = []

    @property
    def load(self) -> Load:
        return Load(len(self._running))

    def check_batching(self) -> None:
        """Find out how many values a vector has, and whether padding changes it.

        If the vector of a text is another beside a longer text, texts are computed one at a time.
        """
        short, long = ([(7919 * place) % self._vocabulary for place in range(1, n + 1)] for n in CHECKED)
        alone, beside = self._vectors([short])[0], self._vectors([short, long])[0]
        self._values = len(alone)
        difference, length = math.dist(alone, beside), math.hypot(*alone)
        rough = self._model.dtype != torch.float32
        self._pads = difference <= (ROUGH_TOLERANCE if rough else TOLERANCE) * length
        if not self._pads:
            log.warning(
                "texts are computed one at a time: padding changes a vector by %.3g", difference / length
            )

    def warm_up(self) -> None:
        """One batch of two texts of different length, so that padding is tried too."""
        self.admit(self.embed(["Hello", "Hello there, world"]))
        self.step()

    def canary(self) -> Canary:
        """The first values of the embedding of a fixed input, in thousandths."""
        fixed = [(7919 * (position + 1)) % self._vocabulary for position in range(CANARY_TOKENS)]
        values = self._vectors([fixed])[0][:CANARY_VALUES]
        return Canary([round(value * 1000) for value in values], 0.0)

    def embed(self, inputs: Sequence[str]) -> Work:
        """As the port says. Reasons: those of ``encode_inputs``."""
        tokens = encode_inputs(
            self._tokenizer, inputs, self.context_length, self._values, self._recipe.prompt
        )
        return Texts(tokens)

    def admit(self, work: Work) -> bool:
        assert isinstance(work, Texts)
        if len(self._running) >= self.capacity.sequences:
            return False
        self._running.append(work)
        return True

    def drop(self, work: Work) -> None:
        assert isinstance(work, Texts)
        if work in self._running:
            self._running.remove(work)

    def step(self) -> Sequence[Output]:
        shares: list[tuple[Texts, int]] = []  # whose texts, how many of them
        batch: list[list[int]] = []
        for work in self._running:
            share = list(work.tokens[work.next : work.next + BATCH - len(batch)])
            shares.append((work, len(share)))
            batch += share
            if len(batch) == BATCH:
                break
        vectors = iter(self._vectors(batch))
        outputs: list[Output] = []
        for work, count in shares:
            tokens = sum(map(len, work.tokens[work.next : work.next + count]))
            item = Embedded([next(vectors) for _ in range(count)], tokens, work.next)
            if not all(map(_is_a_number, item.embeddings)):
                self._running.remove(work)
                failure = Internal("NOT_A_NUMBER", "the model computed a vector that is no number")
                outputs.append(Output(work, failure, last=True))
                continue
            work.next += count
            last = work.next == len(work.tokens)
            if last:
                self._running.remove(work)
            outputs.append(Output(work, item, last))
        return outputs

    def _vectors(self, batch: list[list[int]]) -> list[list[float]]:
        batches = [batch] if self._pads else [[tokens] for tokens in batch]
        return [vector for one in batches for vector in self._compute(one)]

    @torch.inference_mode()
    def _compute(self, batch: list[list[int]]) -> list[list[float]]:
        longest = max(map(len, batch))
        ids = [tokens + [self._pad] * (longest - len(tokens)) for tokens in batch]
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch])
        output = self._model(
            input_ids=torch.tensor(ids, device=self._device),
            attention_mask=mask.to(self._device),
            **self._options,
        )
        mask[:, : self._unpooled] = 0
        # What comes after pooling is small. On the CPU it takes nothing of a GPU that would have to be freed.
        pooled = self._recipe.pool(output.last_hidden_state.float(), mask.to(self._device)).cpu()
        values: list[list[float]] = self._recipe.finish(pooled).tolist()
        return values

    def generate(self, request: Generation) -> Work:
        raise FailedPrecondition(
            "ENGINE_CANNOT_GENERATE", "This instance embeds text; deploy a causal_lm model to generate."
        )

    def quiesce(self) -> None:
        """Free the GPU of weights and caches; on the CPU there is nothing to free."""
        self._weights.detach()
        self._workspace.release()

    def pause(self) -> None:
        # Between two steps nothing of a request is on the GPU.
        self.quiesce()

    def resume(self) -> None:
        self.wake()

    def order_weights(self, loader: Path, gpu: str) -> None:
        self._weights.order(loader, gpu)

    def wake(self) -> None:
        self._workspace.regain()
        self._weights.attach()

    def versions(self) -> dict[str, str]:
        return library_versions()


def _is_a_number(vector: Sequence[float]) -> bool:
    return all(map(math.isfinite, vector))

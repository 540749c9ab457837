"""Sentence embeddings with a transformers encoder and the pooling its model directory asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from dumont.errors import FailedPrecondition
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
from model_host.engines.assembly import build
from model_host.engines.libraries import library_versions
from model_host.engines.tokens import encode_inputs, load_tokenizer
from model_host.model_files import Json, ModelFiles
from model_host.weights import Weights, Workspace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH: Final = 16
SEQUENCES: Final = 64
CANARY_TOKENS: Final = 16
CANARY_VALUES: Final = 8
DEFAULT_CONTEXT: Final = 512


def load(files: ModelFiles, settings: Settings, phases: Phases) -> Embedding:
    """Load a model for embeddings. Errors as in ``assembly.build`` and ``load_tokenizer``."""
    pooling = _pooling(files.pooling)
    with phases.measure("load_tokenizer"):
        tokenizer = load_tokenizer(files)
    model, weights = build(files, settings, phases)
    return Embedding(model, weights, tokenizer, pooling, normalize=files.normalize)


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
        pooling: ``mean`` or ``cls``.
        normalize: whether vectors are scaled to length one.
    """

    name = "embedding"

    def __init__(
        self, model: Any, weights: Weights, tokenizer: Tokenizer, pooling: str, *, normalize: bool
    ) -> None:
        self._model = model
        self._weights = weights
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._normalize = normalize
        self._device = next(model.parameters()).device
        self._workspace = Workspace(self._device)
        self._vocabulary = int(model.config.vocab_size)
        self._pad = int(getattr(model.config, "pad_token_id", None) or 0)
        self.context_length = int(getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT)
        self.device = str(self._device)
        self.capacity = Capacity(SEQUENCES)
        self._running: list[Texts] = []

    @property
    def load(self) -> Load:
        return Load(len(self._running))

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
        return Texts(encode_inputs(self._tokenizer, inputs, self.context_length))

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
        outputs = []
        for work, count in shares:
            tokens = sum(map(len, work.tokens[work.next : work.next + count]))
            item = Embedded([next(vectors) for _ in range(count)], tokens, work.next)
            work.next += count
            last = work.next == len(work.tokens)
            if last:
                self._running.remove(work)
            outputs.append(Output(work, item, last))
        return outputs

    @torch.inference_mode()
    def _vectors(self, batch: list[list[int]]) -> list[list[float]]:
        longest = max(map(len, batch))
        ids = [tokens + [self._pad] * (longest - len(tokens)) for tokens in batch]
        mask = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch]
        attention = torch.tensor(mask, device=self._device)
        output = self._model(input_ids=torch.tensor(ids, device=self._device), attention_mask=attention)
        states = output.last_hidden_state.float()
        if self._pooling == "cls":
            vectors = states[:, 0]
        else:
            weight = attention.unsqueeze(-1).to(states.dtype)
            vectors = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        if self._normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        values: list[list[float]] = vectors.tolist()
        return values

    def generate(self, request: Generation) -> Work:
        raise FailedPrecondition(
            "ENGINE_CANNOT_GENERATE", "This instance embeds text; deploy a causal_lm model to generate."
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


def _pooling(config: Json) -> str:
    modes = {key.removeprefix("pooling_mode_") for key, value in config.items() if value is True}
    known = {"mean_tokens": "mean", "cls_token": "cls"}
    if unknown := modes & {"max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"}:
        raise FailedPrecondition(
            "MODEL_UNSUPPORTED",
            f"This model pools by {', '.join(sorted(unknown))}; only mean_tokens and cls_token are known.",
            field="model",
        )
    return next((known[mode] for mode in modes if mode in known), "mean")

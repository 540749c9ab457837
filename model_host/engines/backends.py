"""Ways to compute chunks of sequences: all in one pass on any device, or each alone for models that need
that.

A backend owns the cache. ``launch`` begins to compute, ``harvest`` waits for the tokens chosen. Between the
two ``relaunch`` may begin the step after, in which every sequence goes one token further, before anybody has
seen the tokens of this one: a GPU then need not wait for the host.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch

from dumont.errors import DumontError, Internal
from model_host.engines import attention
from model_host.engines.attention import KeysAndValues, LayerShape, NotBatchable, Pass, Segment
from model_host.engines.batch import Chunk, TokenSequence
from model_host.engines.kv import Extent
from model_host.engines.sampling import Chosen, choose

log = logging.getLogger(__name__)

# What a chunk's sequence is given: a token, or what is wrong with it.
Result = Chosen | DumontError

# On a CPU: how many prompt tokens a step may have while answers wait for it, and how many tokens in any case.
CPU_PROMPT_ROWS: Final = 128
CPU_ROWS: Final = 512


@dataclass
class Flight:
    """A step under way: the chunks in which a token is chosen, and what is needed to fetch those tokens."""

    sampled: list[Chunk]
    what: Any = None


class Backend(Protocol):
    """Computes on one thread.

    Attributes:
        rows: tokens that a step may have.
        prompt_rows: tokens of prompts in a step while answers wait for it.
    """

    rows: int
    prompt_rows: int

    def reach(self, extent: Extent) -> None:
        """Make sure that there is memory behind an extent.

        Raises:
            DumontError: there is none left.
        """

    def copy(self, source: Extent, target: Extent, count: int) -> None:
        """Copy the keys and values of ``count`` tokens from the start of one extent to that of another."""

    def begin(self, sequence: TokenSequence) -> None:
        """Get ready for a sequence that was admitted."""

    def end(self, sequence: TokenSequence) -> None:
        """Forget a sequence."""

    def launch(self, chunks: Sequence[Chunk]) -> Flight:
        """Begin a step."""

    def relaunch(self, flight: Flight) -> Flight | None:
        """Begin the step after ``flight`` for the same sequences; None if its tokens must be seen first."""

    def harvest(self, flight: Flight) -> list[Result]:
        """Wait for a step; what was chosen in each of ``flight.sampled``."""

    def quiesce(self) -> None:
        """Give memory back, and forget everything of past requests."""

    def wake(self) -> None:
        """Undo ``quiesce``."""

    def pause(self) -> None:
        """Give back memory that holds nothing of requests; nothing is in flight."""

    def resume(self) -> None:
        """Undo ``pause``."""


def shapes(model: Any, cache: Any) -> list[LayerShape]:
    """The shapes of the keys and values of a model's layers, in order.

    Args:
        cache: transformers' own, which the model has filled.

    Raises:
        NotBatchable: some layers keep no keys and values, or share them.
    """
    kept = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    layers = model.config.get_text_config().num_hidden_layers
    if len(kept) != layers:
        raise NotBatchable(f"{len(kept)} of {layers} layers keep keys and values")
    return [LayerShape(one.keys.shape[1], one.keys.shape[3], one.values.shape[3]) for one in kept]


def forward(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, cache: Any, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the rows ``keep``, all if None; shape (rows, vocabulary)."""
    options: dict[str, Any] = {}
    if keep is not None and _keeps_logits(model):
        options["logits_to_keep"] = keep
    output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **options)
    logits: torch.Tensor = output.logits[0]
    if keep is not None and not options:
        return logits[keep]
    return logits


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def choose_rows(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[Result]:
    """A token for each chunk from its row of logits, on the CPU."""
    results: list[Result] = []
    plain = all(c.sequence.sampling.greedy(len(c.sequence.answer)) for c in chunks)
    if plain and all(c.sequence.sampling.logprobs is None for c in chunks):
        best = logits.max(-1)
        if bool(torch.isfinite(best.values).all()):
            return [Chosen(token) for token in best.indices.tolist()]
    rows = logits.float().cpu().numpy()
    for row, chunk in zip(rows, chunks, strict=True):
        sequence = chunk.sequence
        try:
            results.append(
                choose(row, sequence.sampling, sequence.prompt, sequence.answer, sequence.generator)
            )
        except DumontError as error:
            results.append(error)
    return results


def seed(sequence: TokenSequence) -> None:
    """Give a sequence its generator of draws on the CPU."""
    if sequence.seed is not None:
        sequence.generator = np.random.default_rng(sequence.seed % 2**64)


class Together:
    """All chunks in one pass, eagerly; tokens are chosen on the CPU.

    Args:
        tokens: room of the cache.
    """

    rows = CPU_ROWS
    prompt_rows = CPU_PROMPT_ROWS

    def __init__(self, model: Any, device: torch.device, layers: Sequence[LayerShape], tokens: int) -> None:
        self._model = model
        self._device = device
        self._layers = layers
        self._tokens = tokens
        self._cache = self._allocate()

    def _allocate(self) -> KeysAndValues:
        width = sum(layer.width for layer in self._layers)
        # The kernel provides memory only where it is written to, so room that nobody uses costs nothing.
        memory = torch.empty(self._tokens, width, dtype=self._model.dtype, device=self._device)
        return KeysAndValues(memory, self._layers)

    def reach(self, extent: Extent) -> None:
        return

    def copy(self, source: Extent, target: Extent, count: int) -> None:
        self._cache.copy(source.start, target.start, count)

    def begin(self, sequence: TokenSequence) -> None:
        seed(sequence)

    def end(self, sequence: TokenSequence) -> None:
        return

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> Flight:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        keep: list[int] = []
        for chunk in chunks:
            assert chunk.sequence.extent is not None
            start, row, end = chunk.sequence.extent.start, len(ids), chunk.first + chunk.count
            ids += chunk.sequence.slice(chunk.first, chunk.count)
            positions += range(chunk.first, end)
            slots += range(start + chunk.first, start + end)
            segments.append(Segment(row, len(ids), start, end))
            if chunk.sampled:
                keep.append(len(ids) - 1)
        sampled = [chunk for chunk in chunks if chunk.sampled]
        with attention.computing(Pass(self._tensor(slots), segments), self._cache) as cache:
            logits = forward(
                self._model, self._tensor(ids)[None], self._tensor(positions)[None], cache,
                self._tensor(keep or [len(ids) - 1]),
            )  # fmt: skip
        return Flight(sampled, choose_rows(logits, sampled) if sampled else [])

    def relaunch(self, flight: Flight) -> Flight | None:
        return None

    def harvest(self, flight: Flight) -> list[Result]:
        results: list[Result] = flight.what
        return results

    def quiesce(self) -> None:
        del self._cache

    def wake(self) -> None:
        self._cache = self._allocate()

    def pause(self) -> None:
        return

    def resume(self) -> None:
        return

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class Alone:
    """Each sequence in a pass of its own, with transformers' own cache.

    Args:
        model: as transformers made it.
        in_pieces: whether a prompt may be computed in pieces. Some models with a state instead of keys and
            values begin anew with each piece; their prompts are computed whole, when the last piece comes.

    Raises:
        NotBatchable: the model takes no such cache.
    """

    rows = CPU_ROWS
    prompt_rows = CPU_PROMPT_ROWS

    def __init__(self, model: Any, device: torch.device, *, in_pieces: bool = True) -> None:
        self._model = model
        self._device = device
        self._in_pieces = in_pieces
        takes = inspect.signature(model.forward).parameters
        names = [name for name in ("past_key_values", "cache_params") if name in takes]
        if not names:
            raise NotBatchable("it takes no cache of transformers' own")
        self._cache_name = names[0]
        self._caches: dict[TokenSequence, Any] = {}

    def reach(self, extent: Extent) -> None:
        return

    def copy(self, source: Extent, target: Extent, count: int) -> None:
        raise NotImplementedError("what one sequence has computed is of no use to another here")

    def begin(self, sequence: TokenSequence) -> None:
        from transformers.cache_utils import DynamicCache

        seed(sequence)
        self._caches[sequence] = DynamicCache(config=self._model.config)

    def end(self, sequence: TokenSequence) -> None:
        self._caches.pop(sequence, None)

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> Flight:
        results: list[Result] = []
        answered: list[Chunk] = []
        for chunk in chunks:
            if not (self._in_pieces or chunk.sampled):
                continue
            try:
                logits = self._logits(chunk)
                found = choose_rows(logits, [chunk]) if chunk.sampled else []
            except Exception as error:
                log.exception("a sequence cannot be computed")
                found = [Internal("COMPUTE_FAILED", f"the model failed to compute: {type(error).__name__}")]
            if found:
                answered.append(chunk)
                results += found
        return Flight(answered, results)

    def _logits(self, chunk: Chunk) -> torch.Tensor:
        """After the last token of the chunk; shape (1, vocabulary)."""
        of_prompt = chunk.first < len(chunk.sequence.prompt)
        first = 0 if of_prompt and not self._in_pieces else chunk.first
        ids = chunk.sequence.slice(first, chunk.first + chunk.count - first)
        options: dict[str, Any] = {self._cache_name: self._caches[chunk.sequence]}
        if _keeps_logits(self._model) and len(ids) > 1:
            # As an index, which selects a compact copy. A count would leave a strided view, for which torch
            # 2.13 on the CPU copies the whole output matrix: 130 ms for a vocabulary of 49,152.
            on_cpu = self._device.type == "cpu"
            options["logits_to_keep"] = torch.tensor([len(ids) - 1]) if on_cpu else 1
        output = self._model(
            input_ids=torch.tensor([ids], dtype=torch.long, device=self._device),
            use_cache=True,
            **options,
        )
        logits: torch.Tensor = output.logits[:, -1, :]
        return logits

    def relaunch(self, flight: Flight) -> Flight | None:
        return None

    def harvest(self, flight: Flight) -> list[Result]:
        results: list[Result] = flight.what
        return results

    def quiesce(self) -> None:
        self._caches.clear()

    def wake(self) -> None:
        return

    def pause(self) -> None:
        return

    def resume(self) -> None:
        return

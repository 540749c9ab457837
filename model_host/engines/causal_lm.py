"""Text generation with a transformers causal language model, many requests at a time."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from dumont import models
from dumont.errors import DumontError, FailedPrecondition, InvalidArgument, ResourceExhausted
from model_host import cuda
from model_host.engine import (
    Canary,
    Capacity,
    Generation,
    Load,
    Output,
    Phases,
    Settings,
    Work,
)
from model_host.engines import attention, graphs
from model_host.engines.answers import Answering, Step, TextRequests
from model_host.engines.assembly import build, choose_device, positions
from model_host.engines.attention import NotBatchable
from model_host.engines.backends import Alone, Backend, Flight, Together, shapes
from model_host.engines.batch import Chunk, TokenSequence, plan
from model_host.engines.kv import FILLER, GRAIN, WORTH_SHARING, Extent, Extents, Prefixes
from model_host.engines.libraries import library_versions
from model_host.engines.sampling import Chosen, Sampling
from model_host.engines.tokens import load_tokenizer
from model_host.model_files import ModelFiles
from model_host.weights import Weights, Workspace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

CANARY_TOKENS: Final = 16
# Tokens of an answer for which a sequence has room at first. Most answers end long before they have as many
# tokens as their callers allow.
FIRST_ROOM: Final = 512
CPU_CANARY_PIECE: Final = 4
DEFAULT_CONTEXT: Final = 2048

# How many answers a CPU computes together, and the bytes it has for their keys and values.
CPU_SEQUENCES: Final = 64
CPU_KV_CACHE: Final = 2 << 30
# The share of a GPU's memory for keys and values unless the settings name a size, and the number of tokens
# beyond which more room is of no use.
GPU_KV_SHARE: Final = 0.25
GPU_TOKENS: Final = graphs.SEQUENCES * 4096

# Lengths of the two prompts with which a backend is checked. The longer is computed in two pieces, of which
# CHECKED_PIECE is the first.
CHECKED_PROMPTS: Final = (13, 3)
CHECKED_PIECE: Final = 5
# How many of the likeliest tokens are compared at each position.
CHECKED_TOP: Final = 20
# Room in the cache for that check, in tokens.
CHECKED_ROOM: Final = 256
# How far logits may be from transformers' own, as a fraction of their spread; both are root mean squares.
# Adding the same numbers in two orders in bfloat16 made 0.04 after 28 layers; logits that have nothing to do
# with each other are 1.4 apart.
TOLERANCE: Final = {torch.float32: 1e-3}
ROUGH_TOLERANCE: Final = 0.2
# A model that is computed alone is refused when it is this many times further off. That allows for more than
# rounding: one expert chosen differently changes logits further.
ALONE_SLACK: Final = {torch.float32: 20.0}
ROUGH_ALONE_SLACK: Final = 3.5

# What a model raises that is not made for being computed in this way.
FAULTS: Final = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)


def load(files: ModelFiles, settings: Settings, phases: Phases) -> CausalLM:
    """Load a model for text generation. Errors as in ``assembly.build`` and ``load_tokenizer``."""
    compiler = _begin_to_compile(files, settings)
    with phases.measure("load_tokenizer"):
        tokenizer = load_tokenizer(files)
    model, weights = build(files, settings, phases)
    kernels = {}
    if compiler is not None:
        with phases.measure("compile_kernels"):
            kernels = compiler.kernels()
    return CausalLM(model, weights, tokenizer, files, settings, phases, kernels)


def _begin_to_compile(files: ModelFiles, settings: Settings) -> graphs.Compiler | None:
    """A compiler, already at work on the kernels that the configuration suggests.

    None if it suggests none, or there is no GPU.
    """
    device = choose_device(settings.device)
    if device.type != "cuda":
        return None
    text = {**files.config, **files.config.get("text_config", {})}
    try:
        heads = int(text["num_attention_heads"])
        size = int(text.get("head_dim") or text["hidden_size"] // heads)
        shape = (int(text.get("num_key_value_heads") or heads), size, size)
    except (KeyError, TypeError, ValueError):
        return None
    kind = getattr(torch, str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"), torch.float32)
    dtype = graphs.TRITON_TYPES.get(kind)
    if dtype is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return graphs.Compiler(graphs.Wanted(dtype, (shape,), (heads, size // 2)), major * 10 + minor)


@dataclass(frozen=True)
class Right:
    """What backends are checked against.

    Attributes:
        texts: tokens; the last of each is the answer to those before it.
        logits: after each token of each text, shape (tokens, vocabulary).
        cache: transformers' own, as the model filled it.
    """

    texts: list[list[int]]
    logits: list[torch.Tensor]
    cache: Any


class CausalLM:
    """An ``Engine`` that generates."""

    name = "causal_lm"

    def __init__(
        self,
        model: Any,
        weights: Weights,
        tokenizer: Tokenizer,
        files: ModelFiles,
        settings: Settings,
        phases: Phases | None = None,
        kernels: dict[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._tokenizer = tokenizer
        self._files = files
        self._device = next(model.parameters()).device
        self._workspace = Workspace(self._device)
        text_config = model.config.get_text_config()
        self._vocabulary = int(text_config.vocab_size)
        self._context = _context(model)
        self.device = str(self._device)
        self._unbatched = ""
        self._backend, tokens = self._choose_backend(settings, phases or Phases(), kernels or {})
        self._extents = Extents(tokens)
        self._prefixes = Prefixes()
        self._shares = not isinstance(self._backend, Alone)
        self.context_length = min(self._context, self._extents.largest - 1)
        self._requests = TextRequests(
            files, tokenizer, self._vocabulary, self.context_length, settings.max_new_tokens_limit
        )
        on_cpu = self._device.type == "cpu"
        self.capacity = Capacity(
            CPU_SEQUENCES if on_cpu else graphs.SEQUENCES,
            self._extents.largest if self._shares else None,
            self._unbatched,
        )
        # In the order in which they were admitted. The paused ones are the last of them.
        self._running: dict[TokenSequence, tuple[Answering, int]] = {}
        self._paused: list[TokenSequence] = []
        self._flight: Flight | None = None
        # Computed before a pause, and not returned by a step yet.
        self._unsent: list[Output] = []

    # How it computes

    def _choose_backend(
        self, settings: Settings, phases: Phases, kernels: dict[str, Any]
    ) -> tuple[Backend, int]:
        """The fastest backend that computes this model right, and how many tokens it has room for.

        Raises:
            FailedPrecondition: MODEL_UNSUPPORTED, there is none.
        """
        backend: graphs.Graphs | None = None
        try:
            with phases.measure("check_batching"):
                if self._device.type == "cuda" and kernels:
                    log.info("fused: %s", ", ".join(graphs.fuse(self._model, kernels)) or "nothing")
                right = self._try_right_logits()
                layers = shapes(self._model, right.cache)
                attention.install(self._model)
                asked = settings.engine_options.get("kv_cache_memory_bytes") or settings.kv_cache
                budget = asked or self._default_budget()
                token_bytes = sum(layer.width for layer in layers) * self._model.dtype.itemsize
                tokens = max(min(budget // token_bytes, self._most_tokens()), 2 * GRAIN + FILLER)
                if self._device.type != "cuda":
                    self._check(Together(self._model, self._device, layers, CHECKED_ROOM), right)
                    return Together(self._model, self._device, layers, tokens), tokens
            backend = graphs.Graphs(
                self._model, self._device, layers, tokens * token_bytes, self._context, self._vocabulary,
                kernels
            )  # fmt: skip
            backend.capture(phases)
            with phases.measure("check_graphs"):
                self._check(backend, right)
            return backend, backend.tokens
        except NotBatchable as error:
            # As text: a log record that held the error would keep all that failed alive.
            self._unbatched = str(error)
            log.warning("sequences are computed one at a time: %s", self._unbatched)
            if backend is not None:
                backend.quiesce()  # what computes instead does not use its memory
        attention.uninstall(self._model)
        with phases.measure("check_alone"):
            return self._alone(right), self._most_tokens()

    def _alone(self, right: Right) -> Alone:
        wrong = ""
        # A model that picks the tokens it looks at breaks ties by how many are computed at once, so that
        # transformers itself computes a prompt in pieces otherwise than whole.
        picks = getattr(self._model.config.get_text_config(), "index_topk", None)
        for in_pieces in (False,) if picks else (True, False):
            try:
                backend = Alone(self._model, self._device, in_pieces=in_pieces)
                self._check(backend, right, ALONE_SLACK.get(self._model.dtype, ROUGH_ALONE_SLACK))
            except NotBatchable as error:
                wrong = str(error)
                log.warning("prompts cannot be computed %s: %s", "in pieces" if in_pieces else "whole", wrong)
                continue
            return backend
        raise self._unsupported(wrong)

    def _default_budget(self) -> int:
        if self._device.type == "cpu":
            return CPU_KV_CACHE
        return int(torch.cuda.mem_get_info(self._device)[1] * GPU_KV_SHARE)

    def _most_tokens(self) -> int:
        """Room beyond which more is of no use."""
        if self._device.type == "cuda":
            return max(GPU_TOKENS, self._context + FILLER + GRAIN)
        return CPU_SEQUENCES * (self._context + GRAIN) + FILLER

    def _fixed(self, count: int, salt: int = 0) -> list[int]:
        return [(7919 * (position + 1 + salt)) % self._vocabulary for position in range(count)]

    def _try_right_logits(self) -> Right:
        """``_right_logits``.

        Raises:
            FailedPrecondition: MODEL_UNSUPPORTED, they cannot be computed.
        """
        try:
            return self._right_logits()
        except torch.OutOfMemoryError:
            raise
        except FAULTS as error:
            raise self._unsupported(f"transformers cannot compute its logits: {error}") from error

    def _unsupported(self, why: str) -> FailedPrecondition:
        architecture = type(self._model).__name__
        return models.unsupported(
            str(self._files.folder),
            f"{architecture} cannot be computed token by token with transformers' cache: {why}",
            "Its answers would be wrong; deploy another model.",
            architecture,
        )

    @torch.inference_mode()
    def _right_logits(self) -> Right:
        """What transformers itself computes for fixed texts, in one pass; the cache is only written to."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self._model.config)
        texts = [self._fixed(length + 1, salt=length) for length in CHECKED_PROMPTS]
        longest = max(map(len, texts))
        # The padding of the shorter text comes after it, and so changes nothing in it.
        ids = [text + [0] * (longest - len(text)) for text in texts]
        tensor = torch.tensor(ids, dtype=torch.long, device=self._device)
        takes_cache = "past_key_values" in inspect.signature(self._model.forward).parameters
        options = {"past_key_values": cache, "use_cache": True} if takes_cache else {}
        logits = self._model(input_ids=tensor, **options).logits.cpu().float()
        return Right(texts, [row[: len(text)] for row, text in zip(logits, texts, strict=True)], cache)

    def _check(self, backend: Backend, right: Right, slack: float = 1.0) -> None:
        """Check that a backend computes what transformers does: a prompt in two pieces, beside another prompt
        and its answer.

        Args:
            slack: how many times the effect of rounding the logits may be off.

        Raises:
            NotBatchable: it does not.
        """
        sequences = []
        at = FILLER
        for text in right.texts:
            sequence = TokenSequence(text[:-1], 2, Sampling(logprobs=CHECKED_TOP))
            sequence.extent = Extent(at, -(-(len(text) + 1) // GRAIN) * GRAIN)
            at = sequence.extent.end
            sequences.append(sequence)
        long, short = sequences
        try:
            for sequence in sequences:
                backend.begin(sequence)
            prompt = Chunk(short, 0, len(short.prompt), sampled=True)
            self._compare(backend, [Chunk(long, 0, CHECKED_PIECE, sampled=False), prompt], right, slack)
            short.answer.append(right.texts[1][-1])
            rest = Chunk(long, CHECKED_PIECE, len(long.prompt) - CHECKED_PIECE, sampled=True)
            self._compare(backend, [rest, Chunk(short, len(short.prompt), 1, sampled=True)], right, slack)
        except FAULTS as error:
            raise NotBatchable(f"it fails in a batch: {error}") from error
        finally:
            for sequence in sequences:
                backend.end(sequence)

    def _compare(self, backend: Backend, chunks: Sequence[Chunk], right: Right, slack: float) -> None:
        flight = backend.launch(chunks)
        results = backend.harvest(flight)
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        for chunk, result in zip(flight.sampled, results, strict=True):
            if isinstance(result, DumontError):
                raise NotBatchable(f"it fails in a batch: {result}")
            sequence = chunk.sequence
            text = next(n for n, text in enumerate(right.texts) if text[:-1] == sequence.prompt)
            logits = right.logits[text][sequence.length - 1]
            expected = torch.log_softmax(logits, -1)
            off = [float(expected[token]) - logprob for token, logprob in result.top]
            wrong = math.sqrt(sum(value * value for value in off) / len(off))
            allowed = slack * TOLERANCE.get(self._model.dtype, ROUGH_TOLERANCE) * float(logits.std())
            best = result.top[0][1]  # several tokens may share it
            if not (wrong <= allowed and result.logprob >= best - 1e-3):
                raise NotBatchable(
                    f"in a batch its log-probabilities are {wrong:.3g} off; rounding explains {allowed:.3g}"
                )

    # The port

    @property
    def load(self) -> Load:
        return Load(len(self._running), self._extents.used - self._prefixes.tokens)

    def warm_up(self) -> None:
        """Prompts and answers, drawing and greedy, together and alone; the chat template and the tokenizer
        both ways.
        """
        self._run_together(self._requests.synthetic())
        self._forget_prefixes()

    def canary(self) -> Canary:
        """The greedy tokens after pieces of a fixed prompt, and the one after those.

        They are computed as any request is: through all layers and the cache, one step after another.
        """
        sequence = TokenSequence(self._fixed(CANARY_TOKENS), 2, Sampling(logprobs=0))
        if not self._place(sequence):
            raise FailedPrecondition("KV_CACHE_FULL", "the cache has no room for the canary")
        try:
            found = self._compute(
                [
                    Chunk(sequence, at, self._canary_piece, sampled=True)
                    for at in range(0, CANARY_TOKENS, self._canary_piece)
                ]
            )
            sequence.answer.append(found[-1].token)
            found += self._compute([Chunk(sequence, CANARY_TOKENS, 1, sampled=True)])
        finally:
            self._backend.end(sequence)
            if sequence.extent is not None:
                self._extents.give_back(sequence.extent)
        return Canary([chosen.token for chosen in found], round(found[-1].logprob, 4))

    @property
    def _canary_piece(self) -> int:
        """Tokens in a piece: all where each piece needs a pass; one on a GPU, where pieces cost nothing."""
        if not self._shares:
            return CANARY_TOKENS
        return CPU_CANARY_PIECE if self._device.type == "cpu" else 1

    def _compute(self, chunks: Sequence[Chunk]) -> list[Chosen]:
        chosen = []
        for result in self._backend.harvest(self._backend.launch(chunks)):
            if isinstance(result, DumontError):
                raise result
            chosen.append(result)
        return chosen

    def _run_together(self, works: Sequence[Answering]) -> None:
        for work in works:
            if not self.admit(work):
                raise FailedPrecondition("KV_CACHE_FULL", "the cache has no room for the warm-up")
        while self._running:
            for output in self.step():
                if isinstance(output.item, BaseException):
                    raise output.item
                output.work.receive([output.item])

    def generate(self, request: Generation) -> Work:
        """As the port says. Reasons: those of ``limits.check_generate``, INVALID_TOKEN_ID, EMPTY_PROMPT,
        PROMPT_TOO_LONG, TOO_MANY_ANSWERS, INVALID_MESSAGES, NO_CHAT_TEMPLATE.
        """
        work = self._requests.read(request)
        if self._shares and sum(map(_room, work.sequences)) > self._extents.largest:
            raise InvalidArgument(
                "TOO_MANY_ANSWERS",
                f"{request.n} answers of {work.sequences[0].limit} tokens need more room than the cache has; "
                "ask for fewer, or for shorter ones",
                field="n",
            )
        return work

    def embed(self, inputs: Sequence[str]) -> Work:
        raise FailedPrecondition(
            "ENGINE_CANNOT_EMBED", "This instance generates text; deploy an embedding model for embeddings."
        )

    def admit(self, work: Work) -> bool:
        assert isinstance(work, Answering)
        if len(self._running) + len(work.sequences) > self.capacity.sequences and self._running:
            return False
        if self._paused:
            return False
        taken: list[TokenSequence] = []
        for index, sequence in enumerate(work.sequences):
            if not self._place(sequence):
                for admitted in taken:
                    self._release(admitted, keep=False)
                    admitted.computed = admitted.cached = 0
                return False
            taken.append(sequence)
            self._running[sequence] = (work, index)
        if self._shares and len(work.sequences[0].prompt) > WORTH_SHARING:
            first, *others = work.sequences
            first.followers = tuple(others)
            for follower in others:
                follower.follows = True
        return True

    def _place(self, sequence: TokenSequence) -> bool:
        """Give a sequence room, and let it begin."""
        if self._shares:
            try:
                if not self._reserve(sequence):
                    return False
            except DumontError:
                if self._running:
                    return False
                raise
        self._backend.begin(sequence)
        return True

    def _reserve(self, sequence: TokenSequence) -> bool:
        """Give a sequence room for its tokens and some more, and copy what another has computed of them.

        Raises:
            DumontError: there is no memory behind the room.
        """
        known = sequence.slice(0, sequence.length - 1)
        self._prefixes.longest(known)  # as it is used, it is not forgotten for its own sake
        extent = self._find_room(min(sequence.length + FIRST_ROOM, _room(sequence)))
        if extent is None:
            return False
        sequence.extent = extent
        if (shared := self._prefixes.longest(known)) is not None:
            source, sequence.computed = shared
            self._backend.copy(source, extent, sequence.computed)
            if not sequence.answer:
                sequence.cached = sequence.computed
        return True

    def _find_room(self, tokens: int) -> Extent | None:
        """Room with memory behind it, for which prefixes are forgotten; None if there is none.

        Raises:
            DumontError: there is no memory behind the room.
        """
        while (extent := self._extents.take(tokens)) is None:
            if (evicted := self._prefixes.evict()) is None:
                return None
            self._extents.give_back(evicted)
        try:
            self._backend.reach(extent)
        except DumontError:
            self._extents.give_back(extent)
            raise
        return extent

    def _make_room(self) -> None:
        """Let every sequence have room for its next token and the one after."""
        for sequence in list(self._running):
            extent = sequence.extent
            if extent is not None and extent.size < min(sequence.length + 1, _room(sequence)):
                self._grow(sequence, extent)

    def _grow(self, sequence: TokenSequence, extent: Extent) -> None:
        """Move a sequence to an extent of twice the size. For lack of room those admitted last are paused,
        in the end itself.
        """
        wanted = min(2 * extent.size, _room(sequence))
        while (larger := self._room_or_none(wanted)) is None:
            last = next(one for one in reversed(self._running) if one.extent is not None)
            self._pause(last)
            if last is sequence:
                return
        self._backend.copy(extent, larger, sequence.computed)
        self._extents.give_back(extent)
        sequence.extent = larger

    def _room_or_none(self, tokens: int) -> Extent | None:
        try:
            return self._find_room(tokens)
        except DumontError:
            return None

    def _pause(self, sequence: TokenSequence) -> None:
        """Take a sequence's room; what was computed for it is computed again when there is room."""
        assert sequence.extent is not None
        self._extents.give_back(sequence.extent)
        sequence.extent, sequence.computed, sequence.paused = None, 0, True
        # It was the last that was not paused.
        self._paused.insert(0, sequence)

    def _resume(self) -> None:
        """Let those that were paused go on, in the order in which they were admitted, as there is room."""
        while self._paused:
            try:
                if not self._reserve(self._paused[0]):
                    return
            except DumontError:
                if len(self._paused) < len(self._running):
                    return
                raise
            self._paused.pop(0).paused = False

    def drop(self, work: Work) -> None:
        assert isinstance(work, Answering)
        for sequence in work.sequences:
            self._leave(sequence)

    def _leave(self, sequence: TokenSequence) -> None:
        """Take a sequence out; what it has computed is kept for others that begin the same way."""
        sequence.ended = True
        self._release(sequence, keep=True)

    def _release(self, sequence: TokenSequence, *, keep: bool) -> None:
        if self._running.pop(sequence, None) is None:
            return
        self._backend.end(sequence)
        if sequence.paused:
            self._paused.remove(sequence)
            sequence.paused = False
        extent, sequence.extent = sequence.extent, None
        if extent is not None:
            free: Extent | None = extent
            if keep and sequence.computed:
                kept = self._extents.shrink(extent, sequence.computed)
                free = self._prefixes.keep(kept, sequence.tokens())
            if free is not None:
                self._extents.give_back(free)

    def step(self) -> Sequence[Output]:
        try:
            return self._advance()
        except Exception:
            _distrust(self._running)
            raise

    def _advance(self) -> list[Output]:
        if self._unsent:
            outputs, self._unsent = self._unsent, []
            return outputs
        flight, self._flight = self._flight, None
        if flight is None:
            flight = self._launch()
        if self._unchanged(flight):
            self._flight = self._backend.relaunch(flight)
            if self._flight is not None:
                for chunk in self._flight.sampled:
                    chunk.sequence.computed += 1
        return self._outputs(flight)

    def _outputs(self, flight: Flight) -> list[Output]:
        outputs: list[Output] = []
        for chunk, result in zip(flight.sampled, self._backend.harvest(flight), strict=True):
            if not chunk.sequence.ended:
                outputs += self._take(chunk.sequence, result)
        return outputs

    def _launch(self) -> Flight:
        self._make_room()
        self._resume()
        chunks = plan(self._running, self._backend.rows, self._backend.prompt_rows)
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        flight = self._backend.launch(chunks)
        for chunk in chunks:
            if chunk.sequence.followers and chunk.sequence.computed >= len(chunk.sequence.prompt):
                self._share_prompt(chunk.sequence)
        return flight

    def _share_prompt(self, first: TokenSequence) -> None:
        """Copy what was computed of a prompt to the other answers, all but its last token: each of them needs
        logits of its own to draw from.
        """
        assert first.extent is not None
        for follower in first.followers:
            follower.follows = False
            if follower.ended or follower.extent is None:
                continue
            count = len(first.prompt) - 1
            self._backend.copy(first.extent, follower.extent, count)
            follower.computed = count
        first.followers = ()

    def _unchanged(self, flight: Flight) -> bool:
        """Whether the step after ``flight`` is for the same sequences, as far as is known, and has room."""
        sequences = {chunk.sequence for chunk in flight.sampled}
        if self._paused or sequences != self._running.keys():
            return False
        return not any(
            sequence.ended or (sequence.extent is not None and sequence.computed >= sequence.extent.size)
            for sequence in sequences
        )

    def _take(self, sequence: TokenSequence, result: Chosen | DumontError) -> list[Output]:
        work, index = self._running[sequence]
        if isinstance(result, DumontError):
            _distrust(work.sequences)
            self.drop(work)
            return [Output(work, result, last=True)]
        before = len(sequence.answer)
        reason = sequence.take(result.token)
        chosen = result if len(sequence.answer) > before else None
        if reason is not None:
            # A step launched before the end was known may have computed one token too many.
            sequence.computed = min(sequence.computed, sequence.length)
            self._leave(sequence)
        last = reason is not None and all(other.ended for other in work.sequences)
        return [Output(work, Step(index, chosen, reason), last)]

    def _forget_prefixes(self) -> None:
        while (extent := self._prefixes.evict()) is not None:
            self._extents.give_back(extent)

    def quiesce(self) -> None:
        """Forget every prompt; free the GPU of weights and caches."""
        if self._flight is not None:
            self._backend.harvest(self._flight)
            self._flight = None
        self._forget_prefixes()
        self._backend.quiesce()
        self._weights.detach()
        self._workspace.release()

    def pause(self) -> None:
        """Free the GPU of weights and of what requests do not need; their keys and values stay."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._unsent += self._outputs(flight)
        self._backend.pause()
        try:
            self._weights.detach()
            self._workspace.release()
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        self._workspace.regain()
        try:
            self._backend.resume()
            self._weights.attach()
        except cuda.CudaError as error:
            raise ResourceExhausted(
                "GPU_MEMORY", f"the GPU has no room left for this model: {error}", retry_after=1.0
            ) from error

    def order_weights(self, loader: Path, gpu: str) -> None:
        self._weights.order(loader, gpu)

    def wake(self) -> None:
        self._workspace.regain()
        try:
            self._backend.wake()
            self._weights.attach()
        except cuda.CudaError as error:
            raise ResourceExhausted(
                "GPU_MEMORY", f"the GPU has no room left for this model: {error}", retry_after=1.0
            ) from error

    def versions(self) -> dict[str, str]:
        return library_versions()


def _distrust(sequences: Iterable[TokenSequence]) -> None:
    """Let nobody reuse what was computed for these: it may be wrong or missing."""
    for sequence in sequences:
        sequence.computed = 0


def _context(model: Any) -> int:
    """How many tokens a prompt and its answer may have together."""
    context = positions(model) or DEFAULT_CONTEXT
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    for kind in kinds:
        if kind.get("rope_type") != "longrope":
            continue
        # Beyond it other frequencies hold for all tokens of a sequence, those already in the cache, too.
        original = kind.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None) or context
        if original < context:
            log.warning(
                "the context ends at %d tokens of %d: LongRoPE computes anew beyond", original, context
            )
            context = int(original)
    return context


def _room(sequence: TokenSequence) -> int:
    """The most tokens that a sequence needs room for: one more than it may have, for a step launched before
    its end is known.
    """
    return sequence.most + 1

"""Steps as CUDA graphs that sleep with their process.

A graph computes a fixed number of rows, and each row is one token of any sequence: the next token of an
answer or a token of a prompt. In each layer all rows write their keys and values before any row reads them.
So one set of graphs serves prompts and answers, mixed, and a prompt of sixteen tokens costs what one token
costs.

Everything that a graph points to is at the same address for ever. What is large (weights, keys and values,
scratch memory) lies in blocks whose memory is given back while the process is checkpointed, and is neither
copied by the checkpoint nor carried in a snapshot. The graphs themselves are carried: a restored process has
them.

The state of the rows is on the GPU, and each step turns it into the state for the next step. As long as the
same answers go on, the host has nothing to send, and starts a step before it has seen the tokens of the one
before.
"""

from __future__ import annotations

import base64
import ctypes
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dumont.errors import Internal, ResourceExhausted
from model_host import cuda
from model_host.engine import DeviceLost, Phases
from model_host.engines import attention, backends
from model_host.engines.attention import KeysAndValues, LayerShape, NotBatchable, PagedRows, Pass
from model_host.engines.backends import Flight, Result
from model_host.engines.batch import Chunk, TokenSequence
from model_host.engines.kv import FILLER, Extent
from model_host.engines.sampling import Chosen, report

log = logging.getLogger(__name__)

# Rows of the graphs. Up to some thirty rows a step takes as long as with one: it is bound by launches, or by
# reading the weights. Each graph costs 30 MB of every snapshot; one of 512 rows would compute long prompts a
# fifth faster.
BUCKETS: Final = (32, 64, 128, 256)
ROWS: Final = BUCKETS[-1]
SEQUENCES: Final = 256
# Memory for keys and values comes in pieces of this many bytes, as sequences need it.
PIECE: Final = 1 << 30
MOST_BIASES: Final = 2048
# Values that a block of the kernel ``gate`` computes.
GATE_BLOCK: Final = 1024

# Rows of the state, as in kernels.py.
TOKEN, POSITION, SLOT, START, LENGTH, FLAGS = range(6)
TEMPERATURE, TOP_P, TOP_K, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6, 13)
SEED_LOW, SEED_HIGH, PLACE, BIASES = range(13, 17)
STATE_ROWS: Final = 17
SAMPLED, PENALISED, ADJUSTED = 1, 2, 4
IN_PROMPT: Final = 0x4000

TRITON_TYPES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Wanted:
    """What kernels are compiled for; guessed from the model's configuration before it is loaded.

    Attributes:
        shapes: heads, key size and value size of layers.
        rotary: heads, and half of a head's size.
    """

    dtype: str
    shapes: tuple[tuple[int, int, int], ...]
    rotary: tuple[int, int]


class Compiler:
    """A process that compiles our kernels while the model is loaded."""

    def __init__(self, wanted: Wanted, capability: int) -> None:
        self._cache = tempfile.TemporaryDirectory(prefix="kernels-")
        order = {
            "capability": capability, "dtype": wanted.dtype, "shapes": wanted.shapes, "rotary": wanted.rotary,
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "model_host.engines.kernels", json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_CACHE_DIR": self._cache.name, "CUDA_VISIBLE_DEVICES": ""},
        )

    def kernels(self) -> dict[str, cuda.Kernel]:
        """The kernels by name; none if they cannot be compiled here."""
        out, _ = self._process.communicate()
        self._cache.cleanup()
        if self._process.returncode != 0:
            log.warning("no kernels of our own: the compiler ended with status %d", self._process.returncode)
            return {}
        found = {}
        for line in out.splitlines():
            made = json.loads(line)
            code = base64.b64decode(made["code"])
            found[made["name"]] = cuda.Kernel(code, made["entry"], made["threads"], made["shared"])
        return found


# What torch calls for memory, and to give it back: bytes, device, stream.
ALLOCATE: Final = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
FREE: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
# Those that torch was given.
_callbacks: list[Any] = []


class Scratch:
    """Memory that graphs compute in, allocated for torch; it comes and goes behind the same addresses."""

    def __init__(self, device: int) -> None:
        blocks: dict[int, cuda.Block] = {}
        ending = sys.is_finalizing

        def take(size: int, _device: int, _stream: int) -> int:
            try:
                block = cuda.Block(size, device)
                block.map()
            except cuda.CudaError as error:
                log.warning("cannot get %d bytes of scratch memory: %s", size, error)
                return 0
            blocks[block.address] = block
            return block.address

        def put(address: int, _size: int, _device: int, _stream: int) -> None:
            # The addresses stay reserved: a graph may still use them. A process that ends need not tidy up.
            if not ending() and (block := blocks.pop(address, None)):
                block.unmap()

        self._blocks = blocks
        # torch calls them for as long as the process lives, whatever becomes of this object.
        callbacks = ALLOCATE(take), FREE(put)
        _callbacks.extend(callbacks)
        allocate, free = (ctypes.cast(callback, ctypes.c_void_p).value or 0 for callback in callbacks)
        self.pool = torch.cuda.MemPool(torch._C._cuda_customAllocator(allocate, free))

    @property
    def size(self) -> int:
        """Bytes in use while awake."""
        return sum(block.size for block in self._blocks.values())

    def unmap(self) -> None:
        for block in self._blocks.values():
            block.unmap()

    def map(self) -> None:
        for block in self._blocks.values():
            block.map()


class Cache(KeysAndValues):
    """Keys and values in a block of addresses, written by a kernel of our own where there is one."""

    def __init__(
        self, memory: Tensor, shapes: Sequence[LayerShape], state: Tensor, kernels: dict[str, cuda.Kernel]
    ) -> None:
        super().__init__(memory, shapes)
        self._state = state
        self._kernels = [kernels.get(f"store_kv_{s.heads}_{s.key}_{s.value}") for s in shapes]

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        kernel = self._kernels[layer]
        if kernel is None or keys.stride(-1) != 1 or values.stride(-1) != 1:
            super().write(layer, keys, values, slots)
            return
        kernel.launch(
            torch.cuda.current_stream().cuda_stream,
            (keys.shape[1], 1),
            *_pointers(keys, values, self.keys[layer], self.values[layer], self._state),
            *_ints(
                self._state.stride(0), keys.stride(1), keys.stride(0), values.stride(1), values.stride(0),
                self.memory.stride(0),
            ),
            *NO_SCRATCH,
        )  # fmt: skip


class Graphs:
    """A ``Backend`` of CUDA graphs.

    Args:
        budget: bytes for keys and values.
        longest: tokens that a sequence may ever have.

    Raises:
        NotBatchable: the model cannot be captured.
    """

    rows = ROWS
    prompt_rows = ROWS

    def __init__(
        self,
        model: Any,
        device: torch.device,
        layers: Sequence[LayerShape],
        budget: int,
        longest: int,
        vocabulary: int,
        kernels: dict[str, cuda.Kernel],
    ) -> None:
        if "sample" not in kernels:
            raise NotBatchable("there is no kernel that chooses tokens")
        self._model = model
        self._device = device
        self._vocabulary = vocabulary
        self._longest = longest
        self._sample = kernels["sample"]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        width = sum(layer.width for layer in layers)
        self._token_bytes = width * model.dtype.itemsize
        self.tokens = budget // self._token_bytes
        self._block = cuda.Block(self.tokens * self._token_bytes, device.index or 0)
        self._block.map(FILLER * self._token_bytes)
        memory = torch.as_tensor(self._block, device=device)[: self.tokens * self._token_bytes]
        self._state = torch.zeros(STATE_ROWS, ROWS + 1, dtype=torch.int32, device=device)
        self._cache = Cache(memory.view(model.dtype).view(self.tokens, width), layers, self._state, kernels)
        self._firsts = torch.arange(ROWS + 1, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(ROWS, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(ROWS, dtype=torch.float32, device=device)
        self._scratch = Scratch(device.index or 0)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._places: list[int] = list(range(SEQUENCES))
        self._place: dict[TokenSequence, int] = {}
        # While paused: what the scratch memory held of requests.
        self._kept: list[Tensor] = []
        self._make_buffers()

    def _make_buffers(self) -> None:
        """Host memory that the GPU reads and writes. Two of each: one is filled while the other is in use."""
        integers: dict[str, Any] = {"dtype": torch.int32, "pin_memory": True}
        self._staged = [torch.zeros(STATE_ROWS, ROWS + 1, **integers) for _ in range(2)]
        self._fetched = [
            (torch.zeros(ROWS, **integers), torch.zeros(ROWS, dtype=torch.float32, pin_memory=True))
            for _ in range(2)
        ]
        self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    # Capturing

    @torch.inference_mode()
    def capture(self, phases: Phases) -> None:
        """Capture the graphs.

        Raises:
            NotBatchable: the model does something that cannot be captured.
        """
        self._block.map(PIECE)
        try:
            with phases.measure("warm_up_kernels"), torch.cuda.stream(self._stream):
                with torch.cuda.use_mem_pool(self._scratch.pool):
                    self._work = torch.empty(
                        ROWS * self._vocabulary, dtype=torch.float32, device=self._device
                    )
                    self._counts = torch.zeros(
                        SEQUENCES, self._vocabulary, dtype=torch.int16, device=self._device
                    )
                    self._bias_tokens = torch.zeros(
                        SEQUENCES, MOST_BIASES, dtype=torch.int32, device=self._device
                    )
                    self._bias_values = torch.zeros(
                        SEQUENCES, MOST_BIASES, dtype=torch.float32, device=self._device
                    )
                self._rest()
                for bucket in reversed(BUCKETS):
                    self._compute(bucket)
                self._stream.synchronize()
            # The libraries' workspaces must lie in scratch memory. Freed here, they are allocated there while
            # the graphs are captured.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            with phases.measure("capture_graphs"):
                for bucket in reversed(BUCKETS):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(
                        graph,
                        pool=self._scratch.pool.id,  # type: ignore[arg-type]
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ):
                        logits = self._compute(bucket)
                    self._graphs[bucket] = (graph, logits)
        except NotBatchable:
            raise
        except (RuntimeError, cuda.CudaError) as error:
            raise NotBatchable(f"its steps cannot be captured: {error}") from error

    def _rest(self) -> None:
        """Let all rows be fillers: each a single token that looks only at itself."""
        state = np.zeros((STATE_ROWS, ROWS + 1), dtype=np.int32)
        state[LENGTH] = 1
        self._state.copy_(torch.from_numpy(state))

    def _compute(self, rows: int) -> Tensor:
        """What a graph does; the logits, shape (rows, vocabulary)."""
        state = self._state
        paged = PagedRows(
            self._firsts[: rows + 1], state[START, : rows + 1], state[LENGTH, :rows], self._longest
        )
        what = Pass(state[SLOT, :rows].long(), rows=paged)
        with attention.computing(what, self._cache) as cache:
            logits = backends.forward(
                self._model, state[TOKEN, :rows].long()[None], state[POSITION, :rows].long()[None], cache
            )
        logits = logits.contiguous()
        self._sample.launch(
            torch.cuda.current_stream().cuda_stream,
            (rows, 1),
            *_pointers(logits, state),
            *_ints(state.stride(0)),
            *_pointers(
                self._work, self._counts, self._bias_tokens, self._bias_values, self._tokens, self._logprobs
            ),
            *_ints(self._vocabulary),
            *NO_SCRATCH,
        )
        return logits

    # Requests

    def reach(self, extent: Extent) -> None:
        wanted = extent.end * self._token_bytes
        if wanted <= self._block.mapped:
            return
        try:
            self._block.map(-(-wanted // PIECE) * PIECE)
        except cuda.CudaError as error:
            raise ResourceExhausted(
                "GPU_MEMORY_FULL",
                f"the GPU has no room for the keys and values of another request ({error}); call again later",
                retry_after=1.0,
            ) from error

    def copy(self, source: Extent, target: Extent, count: int) -> None:
        with torch.cuda.stream(self._stream):
            self._cache.copy(source.start, target.start, count)

    @torch.inference_mode()
    def begin(self, sequence: TokenSequence) -> None:
        backends.seed(sequence)
        if sequence.seed is None:
            sequence.seed = int(np.random.randint(0, 2**63 - 1))
        place = self._place[sequence] = self._places.pop()
        sampling = sequence.sampling
        with torch.cuda.stream(self._stream):
            if sampling.penalised:
                counts = self._counts[place]
                counts.zero_()
                seen = torch.tensor(sorted(set(sequence.prompt)), dtype=torch.long).to(self._device)
                counts.index_fill_(0, seen, IN_PROMPT)
        self._write_biases(sequence)

    @torch.inference_mode()
    def _write_biases(self, sequence: TokenSequence) -> None:
        """Write what is added to the logits of the sequence's next token, if anything ever is."""
        sampling, place = sequence.sampling, self._place[sequence]
        biases = list(sampling.biases(len(sequence.answer)).items())[:MOST_BIASES]
        if not biases:
            return
        tokens, values = zip(*biases, strict=True)
        with torch.cuda.stream(self._stream):
            self._bias_tokens[place, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32).to(self._device)
            self._bias_values[place, : len(values)] = torch.tensor(values).to(self._device)

    def end(self, sequence: TokenSequence) -> None:
        if (place := self._place.pop(sequence, None)) is not None:
            self._places.append(place)

    # Steps

    def launch(self, chunks: Sequence[Chunk]) -> Flight:
        rows = sum(chunk.count for chunk in chunks)
        bucket = next(size for size in BUCKETS if size >= rows)
        staged = self._staged[self._turn]
        state = staged.numpy()
        self._events[self._turn].synchronize()  # until what was staged there before has been read
        sampled: list[tuple[Chunk, int]] = []
        row = 0
        for chunk in chunks:
            self._fill(state, row, chunk)
            row += chunk.count
            if chunk.sampled:
                sampled.append((chunk, row - 1))
        state[:, row:bucket] = 0
        state[LENGTH, row:bucket] = 1
        with torch.cuda.stream(self._stream):
            self._state[:, :bucket].copy_(staged[:, :bucket], non_blocking=True)
        return self._replay(bucket, sampled)

    def _fill(self, state: Any, row: int, chunk: Chunk) -> None:
        sequence, count, first = chunk.sequence, chunk.count, chunk.first
        assert sequence.extent is not None
        start, rows = sequence.extent.start, slice(row, row + count)
        state[TOKEN, rows] = sequence.slice(first, count)
        state[POSITION, rows] = np.arange(first, first + count)
        state[SLOT, rows] = np.arange(start + first, start + first + count)
        state[START, rows] = start
        state[LENGTH, rows] = np.arange(first + 1, first + count + 1)
        state[FLAGS, rows] = 0
        if not chunk.sampled:
            return
        sampling, last = sequence.sampling, row + count - 1
        given = len(sequence.answer)
        flags = SAMPLED
        if not sampling.greedy(given):
            flags |= ADJUSTED | (PENALISED if sampling.penalised else 0)
            floats = state.view(np.float32)
            floats[TEMPERATURE, last] = sampling.temperature
            floats[TOP_P, last] = sampling.top_p
            floats[MIN_P, last] = sampling.min_p
            floats[REPETITION, last] = sampling.repetition
            floats[PRESENCE, last] = sampling.presence
            floats[FREQUENCY, last] = sampling.frequency
            state[TOP_K, last] = sampling.top_k
            state[PLACE, last] = self._place[sequence]
            if given == sampling.min_new_tokens > 0:
                # An end that was banned so far may have a bias of its own.
                self._write_biases(sequence)
            state[BIASES, last] = min(len(sampling.biases(given)), MOST_BIASES)
            seed = (sequence.seed or 0) % 2**64
            state.view(np.uint32)[SEED_LOW, last] = seed & 0xFFFFFFFF
            state.view(np.uint32)[SEED_HIGH, last] = seed >> 32
        elif sampling.penalised:
            flags |= PENALISED
        state[FLAGS, last] = flags

    def _replay(self, bucket: int, sampled: list[tuple[Chunk, int]]) -> Flight:
        turn = self._turn
        self._turn = 1 - turn
        tokens, logprobs = self._fetched[turn]
        with torch.cuda.stream(self._stream):
            self._graphs[bucket][0].replay()
            tokens[:bucket].copy_(self._tokens[:bucket], non_blocking=True)
            logprobs[:bucket].copy_(self._logprobs[:bucket], non_blocking=True)
            self._events[turn].record(self._stream)
        return Flight([chunk for chunk, _ in sampled], (bucket, turn, [row for _, row in sampled]))

    def relaunch(self, flight: Flight) -> Flight | None:
        bucket, _, rows = flight.what
        following = []
        for chunk, row in zip(flight.sampled, rows, strict=True):
            sequence, sampling = chunk.sequence, chunk.sequence.sampling
            # Only if the token under way cannot be the last, and if the same tokens stay banned after it.
            if chunk.count != 1 or len(sequence.answer) + 2 > sequence.limit:
                return None
            if sampling.logprobs or len(sequence.answer) + 1 <= sampling.min_new_tokens:
                return None
            following.append((Chunk(sequence, chunk.first + 1, 1, sampled=True), row))
        return self._replay(bucket, following)

    def harvest(self, flight: Flight) -> list[Result]:
        bucket, turn, rows = flight.what
        try:
            self._events[turn].synchronize()
        except RuntimeError as error:
            # Errors of kernels show here, and after one of them a process can use its GPU no more.
            raise DeviceLost(f"the GPU failed: {str(error).splitlines()[0]}") from error
        tokens, logprobs = (fetched.numpy() for fetched in self._fetched[turn])
        reported = [row for chunk, row in zip(flight.sampled, rows, strict=True) if _reports(chunk)]
        logits: Any = None
        if reported:
            # One copy of all rows that are needed, and of those between them.
            first, end = min(reported), max(reported) + 1
            logits = self._graphs[bucket][1][first:end].cpu().float().numpy()
        results: list[Result] = []
        for chunk, row in zip(flight.sampled, rows, strict=True):
            token = int(tokens[row])
            if token < 0:
                results.append(
                    Internal("NOT_A_NUMBER", "the model computed no probabilities for the next token")
                )
            elif top := chunk.sequence.sampling.logprobs:
                results.append(report(logits[row - first], token, top, float(logprobs[row])))
            else:
                results.append(Chosen(token, float(logprobs[row])))
        return results

    # Sleep

    def quiesce(self) -> None:
        self._stream.synchronize()
        self._block.unmap()
        self._scratch.unmap()
        del self._staged, self._fetched, self._events

    def wake(self) -> None:
        self._scratch.map()
        self._block.map(PIECE)
        self._make_buffers()

    def pause(self) -> None:
        self._stream.synchronize()
        # The keys and values stay where they are, and the driver carries them along.
        self._kept = [tensor.cpu() for tensor in self._of_requests()] if self._place else []
        self._scratch.unmap()
        del self._staged, self._fetched, self._events

    def resume(self) -> None:
        self._scratch.map()
        self._make_buffers()
        kept, self._kept = self._kept, []
        if kept:
            with torch.cuda.stream(self._stream):
                for tensor, before in zip(self._of_requests(), kept, strict=True):
                    tensor.copy_(before)
            self._stream.synchronize()

    def _of_requests(self) -> tuple[Tensor, Tensor, Tensor]:
        """What lies in scratch memory and belongs to requests under way."""
        return self._counts, self._bias_tokens, self._bias_values


def _reports(chunk: Chunk) -> bool:
    """Whether the likeliest tokens are reported beside the chosen one."""
    return bool(chunk.sequence.sampling.logprobs)


# What Triton's kernels take after their own arguments, and ours do not use.
NO_SCRATCH: Final = (ctypes.c_void_p(0), ctypes.c_void_p(0))


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _ints(*values: int) -> list[ctypes.c_int]:
    return [ctypes.c_int(value) for value in values]


# Fewer and larger kernels

Patch = Callable[..., Any]


def fuse(model: Any, kernels: dict[str, cuda.Kernel]) -> list[str]:
    """Replace what a model computes by many small kernels with one, where both give the same.

    Returns:
        What was replaced.
    """
    done = []
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and _is_plain_norm(m)]
    for norm in norms:
        norm.forward = _fused_norm(norm)
    if norms:
        done.append(f"{len(norms)} norms")
    gated = []
    if "gate" in kernels:
        gated = [m for m in model.modules() if _is_plain_gate(m, kernels["gate"])]
    for layer in gated:
        layer.forward = _fused_gate(layer, kernels["gate"])
    if gated:
        done.append(f"{len(gated)} gates")
    module = sys.modules[type(model).__module__]
    plain = getattr(module, "apply_rotary_pos_emb", None)
    if plain is not None and "rotate" in kernels:
        fused = _fused_rotary(plain, kernels["rotate"])
        if _same_rotation(plain, fused, model):
            module.apply_rotary_pos_emb = fused  # type: ignore[attr-defined]
            done.append("rotary embedding")
    return done


def _fused_norm(norm: Any) -> Patch:
    weight, epsilon = norm.weight, _epsilon(norm)

    def forward(states: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(states, (weight.shape[0],), weight, epsilon)

    return forward


def _epsilon(norm: Any) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if found is None else float(found)


def _is_plain_norm(norm: Any) -> bool:
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dim() != 1 or _epsilon(norm) is None or not weight.is_cuda:
        return False
    states = torch.randn(1, 3, weight.shape[0], dtype=weight.dtype, device=weight.device)
    try:
        return _close(norm(states), _fused_norm(norm)(states))
    except (RuntimeError, TypeError):
        return False


def _fused_gate(layer: Any, kernel: cuda.Kernel) -> Patch:
    def forward(states: Tensor) -> Tensor:
        gates, ups = layer.gate_proj(states), layer.up_proj(states)
        result = torch.empty_like(gates)
        kernel.launch(
            torch.cuda.current_stream().cuda_stream,
            (-(-gates.numel() // GATE_BLOCK), 1),
            *_pointers(gates, ups, result),
            *_ints(gates.numel()),
            *NO_SCRATCH,
        )
        projected: Tensor = layer.down_proj(result)
        return projected

    return forward


def _is_plain_gate(layer: Any, kernel: cuda.Kernel) -> bool:
    parts = [getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, torch.nn.Linear) for part in parts) or not hasattr(layer, "act_fn"):
        return False
    weight = layer.gate_proj.weight
    states = torch.randn(1, 3, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        return weight.dtype in TRITON_TYPES and _close(layer(states), _fused_gate(layer, kernel)(states))
    except (RuntimeError, TypeError):
        return False


def _fused_rotary(plain: Patch, kernel: cuda.Kernel) -> Patch:
    def apply(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if (
            rest or options or not q.is_cuda or q.shape[0] != 1 or not q.dtype == k.dtype == cos.dtype ==
            sin.dtype or cos.dim() != 3 or cos.shape[-1] != q.shape[-1] or cos.shape[1] != q.shape[2] or
            q.stride(-1) != 1 or k.stride(-1) != 1 or cos.stride() != sin.stride() or cos.stride(-1) != 1 or
            q.dtype not in TRITON_TYPES
        ):  # fmt: skip
            result: tuple[Tensor, Tensor] = plain(q, k, cos, sin, *rest, **options)
            return result
        kernel.launch(
            torch.cuda.current_stream().cuda_stream,
            (q.shape[2], 2),
            *_pointers(q, k, cos, sin),
            *_ints(q.stride(2), q.stride(1), k.stride(2), k.stride(1), cos.stride(1), q.shape[1], k.shape[1]),
            *NO_SCRATCH,
        )
        return q, k

    return apply


def _same_rotation(plain: Patch, fused: Patch, model: Any) -> bool:
    config = model.config.get_text_config()
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None) or 0
    size = size or config.hidden_size // heads
    made = {"dtype": model.dtype, "device": next(model.parameters()).device}
    query, key = torch.randn(1, 5, heads, size, **made), torch.randn(1, 5, 1, size, **made)
    angle = torch.randn(1, 5, size // 2, **made).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    try:
        right = plain(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        got = fused(query.clone().transpose(1, 2), key.clone().transpose(1, 2), cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    return all(_close(a, b) for a, b in zip(right, got, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.float(), other.float()
    # This allows for a few roundings in bfloat16 of numbers that may cancel out.
    return bool(((one - other).abs() <= 0.02 * (one.abs() + one.square().mean().sqrt())).all())

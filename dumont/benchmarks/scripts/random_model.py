"""Writes a model of a given architecture with random bfloat16 weights, and a tokenizer that takes any text.

    python random_model.py DIRECTORY < SETTINGS

``SETTINGS`` is a transformers configuration as JSON, ``model_type`` included. On a GPU if there is one.
"""

import json
import sys
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SEED = 0
# transformers' calls are not typed.
Model: Any = AutoModelForCausalLM
FastTokenizer: Any = PreTrainedTokenizerFast


def main() -> None:
    directory = sys.argv[1]
    settings = json.load(sys.stdin)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Model.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer(config.vocab_size).save_pretrained(directory)


def tokenizer(size: int) -> Any:
    """A token for each byte and a numbered word for every other id, so that every token has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{number}" for number in range(len(alphabet), size)]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *words])}
    fast = Tokenizer(BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return FastTokenizer(tokenizer_object=fast)


if __name__ == "__main__":
    main()

"""A model of random weights, made here: no hub, and no file that anybody trained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEED = 0
VOCABULARY = 2048


def make_model(directory: Path, hidden: int = 1024, layers: int = 8) -> Path:
    """Write a Qwen3 of ``hidden`` and ``layers`` in bfloat16 with a tokenizer; by default 250 MB.

    It has no end token: its answers are as long as they are asked to be. A process of its own writes it, for
    this one need not import torch.
    """
    command = (sys.executable, "-m", __name__, str(directory), str(hidden), str(layers))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return directory


def write_model(directory: Path, hidden: int, layers: int) -> None:
    """What ``make_model`` has done in another process."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    # Any text can be read, and most of what is drawn is a word of its own, so that texts differ as tokens do.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{number}" for number in range(len(letters), VOCABULARY)]
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate([*letters, *words])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            # Larger than usual: likeliest tokens must be far from the second likeliest.
            initializer_range=0.1,
        )
    )
    directory.mkdir(parents=True)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

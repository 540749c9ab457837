"""A model of random weights, made here: no hub, and no file that anybody trained."""

from __future__ import annotations

from pathlib import Path

SEED = 0


def make_model(directory: Path, hidden: int = 1024, layers: int = 8) -> Path:
    """A Qwen3 of ``hidden`` and ``layers`` in bfloat16, with a tokenizer of bytes; by default 250 MB.

    It has no end token: its answers are as long as they are asked to be.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(letters),
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
    return directory

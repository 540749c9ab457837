"""A text has the tokens that transformers gives it, whichever of a model's files says how."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AlbertTokenizer, AutoTokenizer, BertTokenizer, GPT2Tokenizer, LlamaTokenizer

from dumont.errors import FailedPrecondition
from model_host import model_files
from model_host.engines.tokens import load_tokenizer
from tests.unit.model_host.tiny_models import llama

LETTERS = [chr(code) for code in range(33, 127)]
TEXTS = ("Hello world", " hello  W é 漢字", "<s>hello</s>hello", "hello<|im_end|>hello")


def bert() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), "é", "漢", "漢字", "##字"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def albert() -> Any:
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    return AlbertTokenizer(
        vocab=[*((word, 0.0) for word in special), ("▁", -2.0), *((letter, -5.0) for letter in LETTERS)]
    )


def gpt2() -> Any:
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return GPT2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def llamas() -> Any:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    return LlamaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


@pytest.mark.parametrize(
    ("kind", "make", "setting"),
    [
        ("bert", bert, {"do_lower_case": False}),
        ("bert", bert, {"strip_accents": False}),
        ("bert", bert, {"tokenize_chinese_chars": False}),
        ("albert", albert, {"do_lower_case": False}),
        ("albert", albert, {"add_prefix_space": False}),
        ("gpt2", gpt2, {"add_prefix_space": True}),
        ("gpt2", gpt2, {"additional_special_tokens": ["<|im_end|>"]}),
        ("llama", llamas, {"add_prefix_space": False}),
        ("llama", llamas, {"legacy": True}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_beside_tokenizer_json_holds_as_in_transformers(
    tmp_path: Path, kind: str, make: Callable[[], Any], setting: dict[str, Any]
) -> None:
    # given a model whose tokenizer_config.json says something else than its tokenizer.json
    llama(tmp_path)
    make().save_pretrained(tmp_path)
    for file, more in (("tokenizer_config.json", setting), ("config.json", {"model_type": kind})):
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({**content, **more}))
    right = AutoTokenizer.from_pretrained(tmp_path)
    # then the tokens are those of transformers
    tokenizer = load_tokenizer(model_files.read(tmp_path))
    for text in TEXTS:
        assert tokenizer.encode(text).ids == right(text)["input_ids"], text


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    # given a model of which transformers would make a tokenizer without words
    llama(tmp_path)
    (tmp_path / "tokenizer.json").unlink()

    with pytest.raises(FailedPrecondition, match=r"tokenizer\.json in .* is missing"):
        load_tokenizer(model_files.read(tmp_path))

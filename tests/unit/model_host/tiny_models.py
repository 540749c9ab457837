"""Models of a few thousand parameters in float32, whose answers can be compared exactly."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from model_host import model_files
from model_host.engine import Finish, Generation, Phases, Piece, Settings, Work
from model_host.engines import causal_lm
from model_host.engines.answers import Answering
from model_host.engines.causal_lm import CausalLM

VOCABULARY = 64
CONTEXT = 48
WORDS = [f"w{number}" for number in range(VOCABULARY)]


def words(tokens: list[int]) -> str:
    """A prompt of these tokens."""
    return " ".join(WORDS[token] for token in tokens)


def save(model: Any, folder: Path) -> Path:
    """Write a model and the tokenizer of ``WORDS`` to ``folder``."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def llama(folder: Path) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None,
        eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return save(LlamaForCausalLM(config), folder)


def load(folder: Path, **settings: Any) -> CausalLM:
    return causal_lm.load(
        model_files.read(folder),
        # One thread: what is to be computed is too small for two to take turns at it.
        Settings(**{"device": "cpu", "max_new_tokens_limit": 100, "threads": 1, **settings}),
        Phases(),
    )


@dataclass
class Answer:
    """What a caller was sent for one answer."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    finish: Finish | None = None


def answers(work: Work, computed: list[Any]) -> list[Answer]:
    """What the caller of ``work`` is sent, for each of ``n``."""
    assert isinstance(work, Answering)
    found = [Answer() for _ in work.sequences]
    for item in work.receive(computed).items:
        answer = found[item.index]
        if isinstance(item, Finish):
            answer.finish = item
        else:
            answer.pieces.append(item)
            answer.tokens += item.token_ids
            answer.text += item.text
    return found


def run_all(engine: CausalLM, works: list[Work]) -> dict[Work, list[Any]]:
    """Admit works and step until all have ended; what was computed for each."""
    for work in works:
        assert engine.admit(work)
    computed: dict[Work, list[Any]] = defaultdict(list)
    while engine.load.sequences:
        for output in engine.step():
            computed[output.work].append(output.item)
    return computed


def run(engine: CausalLM, **fields: Any) -> Answer:
    """The only answer to a request that is alone."""
    work = engine.generate(Generation(**fields))
    [answer] = answers(work, run_all(engine, [work])[work])
    return answer

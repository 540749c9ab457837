"""Text generation with a tiny model in float32, where every answer can be compared exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dumont.errors import FailedPrecondition, InvalidArgument
from model_host.engine import Finish, FinishReason, Generation, Load, Message
from model_host.engines.causal_lm import CausalLM
from tests.unit.model_host.tiny_models import CONTEXT, WORDS, llama, load, run

PROMPT = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
PROMPT_TOKENS = list(range(1, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> CausalLM:
    return load(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    """Twelve greedy tokens from transformers' own generate."""
    model = LlamaForCausalLM.from_pretrained(folder)
    output = model.generate(torch.tensor([PROMPT_TOKENS]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    tokens: list[int] = output[0, len(PROMPT_TOKENS) :].tolist()
    return tokens


def test_greedy_tokens_are_those_of_transformers(engine: CausalLM, expected: list[int]) -> None:
    answer = run(engine, prompt=PROMPT, max_new_tokens=12)

    assert answer.tokens == expected
    assert answer.text.split() == [WORDS[token] for token in expected]
    assert answer.finish == Finish(FinishReason.LENGTH, prompt_tokens=9, output_tokens=12)


@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 9, 10])
def test_a_prompt_computed_in_chunks_gives_the_same(
    engine: CausalLM, expected: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._backend, "rows", chunk)
    engine._forget_prefixes()

    assert run(engine, prompt=PROMPT, max_new_tokens=12).tokens == expected


def test_between_chunks_of_a_prompt_a_call_can_be_stopped(
    engine: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._backend, "rows", 4)
    engine._forget_prefixes()
    work = engine.generate(Generation(prompt=PROMPT))
    assert engine.admit(work)

    assert engine.step() == []
    engine.drop(work)

    assert engine.load == Load()


def test_the_models_end_mark_ends_the_answer(folder: Path, expected: list[int], tmp_path: Path) -> None:
    # given a model whose end mark is the fourth token it would say
    for file in folder.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    end = expected[3]
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))

    answer = run(load(tmp_path), prompt=PROMPT, max_new_tokens=12)

    # then what came before is the answer, and the mark is neither text nor counted
    until = expected.index(end)
    assert answer.tokens == expected[:until]
    assert WORDS[end] not in answer.text.split()
    assert answer.finish == Finish(FinishReason.END, prompt_tokens=9, output_tokens=until)


def test_a_stop_string_cuts_the_text_and_counts_its_tokens(engine: CausalLM, expected: list[int]) -> None:
    stop = " " + WORDS[expected[2]]

    answer = run(engine, prompt=PROMPT, max_new_tokens=12, stop=(stop,))

    assert stop not in answer.text
    assert answer.finish == Finish(FinishReason.STOP, prompt_tokens=9, output_tokens=len(answer.tokens))
    assert len(answer.tokens) <= 3


def test_an_answer_ends_where_the_context_does(engine: CausalLM) -> None:
    answer = run(engine, prompt=PROMPT, max_new_tokens=100)

    assert answer.finish == Finish(FinishReason.LENGTH, prompt_tokens=9, output_tokens=CONTEXT - 9)


def test_a_prompt_must_leave_room_for_an_answer(engine: CausalLM) -> None:
    with pytest.raises(InvalidArgument) as refused:
        engine.generate(Generation(prompt="w1 " * CONTEXT))

    assert (refused.value.reason, refused.value.field) == ("PROMPT_TOO_LONG", "prompt")
    assert refused.value.metadata == {"tokens": "48", "context_length": "48"}
    assert len(run(engine, prompt="w1 " * (CONTEXT - 1)).tokens) == 1


def test_a_prompt_of_nothing_but_space_is_empty(engine: CausalLM) -> None:
    with pytest.raises(InvalidArgument) as refused:
        engine.generate(Generation(prompt="   "))
    assert refused.value.reason == "EMPTY_PROMPT"


def test_a_conversation_needs_a_chat_template(engine: CausalLM) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        engine.generate(Generation(messages=(Message("user", "w1"),)))
    assert refused.value.reason == "NO_CHAT_TEMPLATE"


def test_a_template_may_refuse_a_conversation(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    template = (
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ message.content }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    engine = load(tmp_path)

    answer = run(engine, messages=(Message("user", "w1"), Message("assistant", "w2")), max_new_tokens=1)
    with pytest.raises(InvalidArgument) as refused:
        engine.generate(Generation(messages=(Message("system", "w1"),)))

    assert answer.finish == Finish(FinishReason.LENGTH, prompt_tokens=3, output_tokens=1)
    assert (refused.value.reason, refused.value.field) == ("INVALID_MESSAGES", "messages")


def test_a_seed_repeats_a_draw_whatever_was_drawn_before(engine: CausalLM) -> None:
    def draw(seed: int) -> list[int]:
        return run(engine, prompt=PROMPT, max_new_tokens=12, temperature=2.0, top_p=0.99, seed=seed).tokens

    first = draw(-5)
    torch.rand(3)

    assert draw(-5) == first
    assert draw(6) != first


def test_a_tiny_top_p_is_greedy(engine: CausalLM, expected: list[int]) -> None:
    drawn = run(engine, prompt=PROMPT, max_new_tokens=12, temperature=1.0, top_p=1e-6, seed=1)

    assert drawn.tokens == expected


def test_the_canary_is_the_same_each_time(engine: CausalLM) -> None:
    first = engine.canary()
    run(engine, prompt=PROMPT, max_new_tokens=2)

    assert engine.canary() == first
    assert len(first.tokens) == 5
    assert first.logprob < 0


def test_a_changed_weight_changes_the_canary(folder: Path) -> None:
    engine = load(folder)
    before = engine.canary()

    with torch.inference_mode():
        engine._model.model.layers[1].mlp.down_proj.weight[0].mul_(50)

    assert engine.canary() != before

"""Text generation with a tiny model in float32, where every answer can be compared exactly."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LlamaForCausalLM

from dumont.errors import FailedPrecondition, Internal, InvalidArgument
from model_host.engine import Capacity, Finish, FinishReason, Generation, Load, Message, Piece
from model_host.engines import causal_lm
from model_host.engines.answers import Answering, Step
from model_host.engines.backends import Flight, Together
from model_host.engines.batch import Chunk, TokenSequence
from model_host.engines.causal_lm import CausalLM
from model_host.engines.kv import FILLER
from model_host.engines.sampling import Chosen, Sampling
from model_host.scheduler import Scheduler
from tests.unit.model_host.tiny_models import CONTEXT, WORDS, answers, llama, load, run, run_all, words

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
    model: Any = LlamaForCausalLM.from_pretrained(folder)
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


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.9},
        {"suppress_tokens": "the first"},
        {"suppress_tokens": "the first", "repetition_penalty": 1.5},
        {"bad_words_ids": "the third"},
        {"eos_token_id": "the third", "min_length": len(PROMPT_TOKENS) + 6},
        {"eos_token_id": "the third", "min_new_tokens": 5},
        {"eos_token_id": "the third", "bad_words_ids": "the third"},
    ],
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_what_a_model_asks_for_is_what_transformers_does(
    folder: Path, tmp_path: Path, expected: list[int], settings: dict[str, Any], file: str
) -> None:
    # given a model with settings for all its answers, in the file of today or in that of former times
    named: dict[object, Any] = {"the first": expected[0], "the third": expected[2]}
    values = {name: named.get(value, value) for name, value in settings.items()}
    if "suppress_tokens" in values:
        values["suppress_tokens"] = [values["suppress_tokens"]]
    if "bad_words_ids" in values:
        values["bad_words_ids"] = [[values["bad_words_ids"]]]
    for known in folder.iterdir():
        if known.name != file and known.name != "generation_config.json":
            (tmp_path / known.name).hardlink_to(known)
    before = json.loads((folder / file).read_text()) if file == "config.json" else {}
    (tmp_path / file).write_text(json.dumps({**before, **values}))
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    output = model.generate(torch.tensor([PROMPT_TOKENS]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    right = output[0, len(PROMPT_TOKENS) :].tolist()
    if "eos_token_id" in values and values["eos_token_id"] in right:
        right = right[: right.index(values["eos_token_id"])]

    assert run(load(tmp_path), prompt=PROMPT, max_new_tokens=12).tokens == right


def test_stop_strings_of_a_model_end_its_answers(folder: Path, tmp_path: Path, expected: list[int]) -> None:
    for known in folder.iterdir():
        if known.name != "generation_config.json":
            (tmp_path / known.name).hardlink_to(known)
    stop = WORDS[expected[2]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": [stop]}))

    answer = run(load(tmp_path), prompt=PROMPT, max_new_tokens=12)

    assert stop not in answer.text
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.STOP


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


def test_a_prompt_that_is_far_too_long_is_not_tokenised_whole(engine: CausalLM) -> None:
    with pytest.raises(InvalidArgument) as refused:
        engine.generate(Generation(prompt="w1 " * 1_000_000))

    assert (refused.value.reason, refused.value.field) == ("PROMPT_TOO_LONG", "prompt")
    assert "more than" in refused.value.message
    assert CONTEXT < int(refused.value.metadata["tokens"]) < 100_000


def test_a_long_prompt_of_few_tokens_is_answered(engine: CausalLM, expected: list[int]) -> None:
    assert run(engine, prompt=PROMPT + " " * 200_000, max_new_tokens=4).tokens == expected[:4]


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


def test_a_cache_that_forgets_changes_the_canary(engine: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    # given keys and values that are not where the next step looks for them
    before = engine.canary()
    backend = engine._backend
    assert isinstance(backend, Together)
    monkeypatch.setattr(backend._cache, "write", lambda *_: None)
    backend._cache.memory.zero_()

    # then the canary, which is computed through the cache and one step more, says so
    assert engine.canary() != before


def said(engine: CausalLM, **fields: Any) -> list[list[int]]:
    """The tokens of each of ``n`` answers to a request that is alone."""
    work = engine.generate(Generation(**fields))
    return [answer.tokens for answer in answers(work, run_all(engine, [work])[work])]


def test_answers_are_drawn_with_seeds_that_follow_each_other(engine: CausalLM) -> None:
    alone = [said(engine, prompt=PROMPT, max_new_tokens=8, temperature=2.0, seed=seed) for seed in (5, 6, 7)]

    together = said(engine, prompt=PROMPT, max_new_tokens=8, temperature=2.0, seed=5, n=3)

    assert together == [tokens for [tokens] in alone]
    assert len(set(map(tuple, together))) == 3


def test_a_drawn_answer_is_the_same_beside_others(engine: CausalLM) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 8, "temperature": 2.0, "seed": 5}
    [alone] = said(engine, **fields)

    works = [engine.generate(Generation(**fields)), engine.generate(Generation(prompt=PROMPT))]
    computed = run_all(engine, works)

    assert answers(works[0], computed[works[0]])[0].tokens == alone


def test_each_answer_has_its_own_end(engine: CausalLM) -> None:
    work = engine.generate(Generation(prompt=PROMPT, max_new_tokens=4, temperature=2.0, seed=5, n=2))

    found = answers(work, run_all(engine, [work])[work])

    for index, answer in enumerate(found):
        assert answer.finish == Finish(FinishReason.LENGTH, 9, 4, index=index)
        assert {piece.index for piece in answer.pieces} == {index}


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(engine: CausalLM, expected: list[int]) -> None:
    answer = run(engine, prompt=PROMPT, max_new_tokens=12, stop_token_ids=(expected[3],))

    until = expected.index(expected[3])
    assert answer.tokens == expected[:until]
    assert answer.finish == Finish(FinishReason.STOP, prompt_tokens=9, output_tokens=until)


@pytest.fixture
def ending(folder: Path, expected: list[int], tmp_path: Path) -> CausalLM:
    """A model whose end mark is the second token that it would say."""
    for file in folder.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": expected[1]}))
    return load(tmp_path)


def test_the_end_mark_can_be_ignored(ending: CausalLM, expected: list[int]) -> None:
    answer = run(ending, prompt=PROMPT, max_new_tokens=12, ignore_eos=True)

    assert answer.tokens == expected


def test_an_answer_has_its_least_length(ending: CausalLM, expected: list[int]) -> None:
    answer = run(ending, prompt=PROMPT, max_new_tokens=12, min_new_tokens=5)

    assert len(answer.tokens) >= 5
    assert expected[1] not in answer.tokens
    assert answer.tokens[0] == expected[0]


def test_log_probabilities_come_with_their_tokens(
    engine: CausalLM, folder: Path, expected: list[int]
) -> None:
    answer = run(engine, prompt=PROMPT, max_new_tokens=4, logprobs=2)

    model: Any = LlamaForCausalLM.from_pretrained(folder)
    logits = model(torch.tensor([PROMPT_TOKENS + expected[:4]])).logits[0, 8:12].detach()
    plain = torch.log_softmax(logits, -1)
    told = [logprob for piece in answer.pieces for logprob in piece.logprobs]
    assert [(t.token_id, t.text) for t in told] == [(token, WORDS[token]) for token in expected[:4]]
    for place, token in enumerate(told):
        assert token.logprob == pytest.approx(float(plain[place, expected[place]]), abs=1e-4)
        likeliest = plain[place].topk(2)
        assert [(top.token_id, top.text) for top in token.top] == [
            (index, WORDS[index]) for index in likeliest.indices.tolist()
        ]
        assert [top.logprob for top in token.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


def test_a_token_that_the_model_does_not_have_is_named(engine: CausalLM) -> None:
    for request in (
        Generation(prompt=PROMPT, logit_bias={64: 1.0}),
        Generation(prompt=PROMPT, stop_token_ids=(64,)),
    ):
        with pytest.raises(InvalidArgument) as refused:
            engine.generate(request)
        assert refused.value.reason == "INVALID_TOKEN_ID"
        assert refused.value.field == ("logit_bias" if request.logit_bias else "stop_token_ids")


def test_a_biased_token_is_said(engine: CausalLM) -> None:
    assert run(engine, prompt=PROMPT, max_new_tokens=3, logit_bias={17: 100.0}).tokens == [17, 17, 17]


# Room


def tokens_of_room(folder: Path, tokens: int) -> CausalLM:
    """An engine whose cache has room for so many tokens."""
    values = 2 * 2 * 2 * 8  # two layers, keys and values, two heads, eight values each
    return load(folder, kv_cache=(FILLER + tokens) * values * 4)


def test_a_deployment_may_choose_the_size_of_the_cache(folder: Path) -> None:
    values = 2 * 2 * 2 * 8
    chosen = load(folder, engine_options={"kv_cache_memory_bytes": (FILLER + 64) * values * 4})

    assert chosen.capacity.kv_tokens == 64


def test_several_answers_to_one_prompt_compute_it_once(
    engine: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given what each of three draws is alone, and a prompt that no other shares
    prompt = words([5, *range(1, 24)])
    asked: dict[str, Any] = {"prompt": prompt, "max_new_tokens": 6, "temperature": 1.0}
    alone = [run(engine, seed=7 + index, **asked).tokens for index in range(3)]
    engine._forget_prefixes()
    rows = 0
    launch = engine._backend.launch

    def counted(chunks: Sequence[Chunk]) -> Flight:
        nonlocal rows
        rows += sum(chunk.count for chunk in chunks)
        return launch(chunks)

    monkeypatch.setattr(engine._backend, "launch", counted)

    # when they are asked for at once
    work = engine.generate(Generation(seed=7, n=3, **asked))
    found = answers(work, run_all(engine, [work])[work])

    # then they are the same, and the prompt's tokens but the last were computed once
    assert [answer.tokens for answer in found] == alone
    assert [answer.finish.cached_prompt_tokens for answer in found if answer.finish] == [0, 0, 0]
    assert rows == (24 - 1) + 3 + 3 * (6 - 1)
    assert engine.load == Load()


def test_answers_to_one_prompt_end_together_if_their_caller_leaves_before_it_is_computed(
    engine: CausalLM, expected: list[int]
) -> None:
    work = engine.generate(Generation(prompt=words(list(range(1, 24))), n=3))
    assert engine.admit(work)
    engine.drop(work)

    assert engine.load == Load()
    assert run(engine, prompt=PROMPT, max_new_tokens=4).tokens == expected[:4]


def test_what_can_never_fit_is_refused_by_name(folder: Path) -> None:
    small = tokens_of_room(folder, 32)

    assert small.context_length == 31
    assert small.capacity == Capacity(sequences=64, kv_tokens=32)
    with pytest.raises(InvalidArgument) as refused:
        small.generate(Generation(prompt="w1 " * 31))
    assert (refused.value.reason, refused.value.field) == ("PROMPT_TOO_LONG", "prompt")
    with pytest.raises(InvalidArgument) as refused:
        small.generate(Generation(prompt=PROMPT, max_new_tokens=10, n=2))
    assert (refused.value.reason, refused.value.field) == ("TOO_MANY_ANSWERS", "n")


def test_what_does_not_fit_now_waits_and_is_answered(folder: Path, expected: list[int]) -> None:
    small = tokens_of_room(folder, 32)
    scheduler = Scheduler(small, max_queue=8)

    jobs = [scheduler.submit(small.generate(Generation(prompt=PROMPT, max_new_tokens=12))) for _ in range(3)]
    found = [[item for item in job if isinstance(item, Piece)] for job in jobs]
    scheduler.close()

    assert [[token for piece in pieces for token in piece.token_ids] for pieces in found] == [expected] * 3


def test_answers_of_which_some_had_no_room_are_admitted_later(folder: Path) -> None:
    # given room for one more, when two come
    small = tokens_of_room(folder, 64)
    fields: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 8, "temperature": 2.0, "seed": 5, "n": 2}
    alone = said(load(folder), **fields)
    first = small.generate(Generation(prompt="w9 " * 20, max_new_tokens=10))
    second = small.generate(Generation(**fields))
    assert small.admit(first)
    assert not small.admit(second)

    # then neither of the two holds anything, and once there is room both are answered
    assert small.load.sequences == 1
    assert small.load.kv_tokens == 32
    small.drop(first)
    found = answers(second, run_all(small, [second])[second])

    assert [answer.tokens for answer in found] == alone


def test_callers_who_allow_more_than_they_use_do_not_keep_others_out(
    folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given room for two answers of the length that each caller allows
    monkeypatch.setattr(causal_lm, "FIRST_ROOM", 4)
    small = tokens_of_room(folder, 96)
    fields: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 38, "stop_token_ids": (expected[3],)}
    works = [small.generate(Generation(**fields)) for _ in range(6)]

    # then six that end early are answered at once
    computed = run_all(small, works)

    assert [answers(work, computed[work])[0].tokens for work in works] == [expected[:3]] * 6


def test_who_is_paused_for_lack_of_room_goes_on_without_a_gap(
    folder: Path, engine: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given answers that all grow until there is room for two of them
    prompts = [words([number + 1, *range(2, 10)]) for number in range(4)]
    alone = [run(engine, prompt=prompt, max_new_tokens=36).tokens for prompt in prompts]
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5, "n": 2}
    alone_drawn = said(engine, prompt=words(list(range(30, 50))), max_new_tokens=16, **drawn)
    monkeypatch.setattr(causal_lm, "FIRST_ROOM", 4)
    small = tokens_of_room(folder, 112)
    works = [small.generate(Generation(prompt=prompt, max_new_tokens=36)) for prompt in prompts[:2]]
    works += [small.generate(Generation(prompt=words(list(range(30, 50))), max_new_tokens=16, **drawn))]
    works += [small.generate(Generation(prompt=prompt, max_new_tokens=36)) for prompt in prompts[2:]]
    scheduler = Scheduler(small, max_queue=8)
    paused: list[TokenSequence] = []
    pause = small._pause

    def noted(sequence: TokenSequence) -> None:
        paused.append(sequence)
        pause(sequence)

    monkeypatch.setattr(small, "_pause", noted)

    # when they run together
    jobs = scheduler.call(lambda: [scheduler.submit(work) for work in works])
    found = [list(job) for job in jobs]
    scheduler.close()

    # then some were paused, the last admitted first, and each has its own tokens, each once
    assert paused
    assert cast(Answering, works[0]).sequences[0] not in paused
    for place, said_alone in ((0, alone[0]), (1, alone[1]), (3, alone[2]), (4, alone[3])):
        assert [token for item in found[place] if isinstance(item, Piece) for token in item.token_ids] == (
            said_alone
        )
    for index in range(2):
        pieces = [item for item in found[2] if isinstance(item, Piece) and item.index == index]
        assert [token for piece in pieces for token in piece.token_ids] == alone_drawn[index]
    assert small.load == Load()


def test_one_who_leaves_while_paused_leaves_nothing(
    folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "FIRST_ROOM", 4)
    small = tokens_of_room(folder, 48)
    first, second = (small.generate(Generation(prompt=PROMPT, max_new_tokens=12)) for _ in range(2))
    assert small.admit(first)
    assert small.admit(second)
    computed = []
    while not small._paused:
        computed += [output.item for output in small.step() if output.work is first]

    # A newcomer does not overtake whoever waits for its room.
    assert not small.admit(small.generate(Generation(prompt="w1", max_new_tokens=1)))
    small.drop(second)
    while small.load.sequences:
        computed += [output.item for output in small.step()]

    assert answers(first, computed)[0].tokens == expected
    assert small.load == Load()
    assert not small._paused


# What is shared


def test_a_prompt_that_begins_alike_is_not_computed_again(engine: CausalLM, folder: Path) -> None:
    engine._forget_prefixes()
    shared = "w5 w6 w7 w8 w9 " * 4
    first = run(engine, prompt=shared + "w1", max_new_tokens=4)
    second = run(engine, prompt=shared + "w2", max_new_tokens=6)
    again = run(engine, prompt=shared + "w1", max_new_tokens=4)

    model: Any = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8, 9] * 4 + [2]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert second.tokens == output[0, 21:].tolist()
    assert first.tokens == again.tokens
    cached = [answer.finish.cached_prompt_tokens for answer in (first, second, again) if answer.finish]
    # At least the last token is computed, because one is chosen after it.
    assert cached == [0, 20, 20]


def test_kept_prefixes_make_room_for_requests(folder: Path, expected: list[int]) -> None:
    small = tokens_of_room(folder, 48)
    for word in ("w20 ", "w21 ", "w22 "):
        run(small, prompt=word * 20, max_new_tokens=4)
    assert small._prefixes.tokens > 0

    assert run(small, prompt=PROMPT, max_new_tokens=12).tokens == expected
    assert run(small, prompt="w1 " * 40, max_new_tokens=4).finish is not None


def test_what_a_failed_step_was_to_compute_is_not_reused(
    engine: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a step that failed before all layers had their keys and values
    prompt = "w31 w32 w33 w34 " * 5
    engine._forget_prefixes()
    right = run(engine, prompt=prompt, max_new_tokens=6).tokens
    engine._forget_prefixes()
    run(engine, prompt="w40 " * 30, max_new_tokens=6)  # what lies in the cache now is another's
    engine._forget_prefixes()
    work = engine.generate(Generation(prompt=prompt, max_new_tokens=6))
    assert engine.admit(work)
    with monkeypatch.context() as patch:
        patch.setattr(engine._model.model.layers[1], "forward", broken)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.drop(work)

    # when the same prompt comes again, then its answer is right
    assert run(engine, prompt=prompt, max_new_tokens=6).tokens == right


def broken(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError


def test_what_is_no_number_ends_one_alone_and_is_not_reused(
    engine: CausalLM, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given one of two requests whose keys and values are no numbers
    engine._forget_prefixes()
    prompt = "w31 w32 w33 w34 " * 5
    right = run(engine, prompt=prompt, max_new_tokens=6).tokens
    engine._forget_prefixes()
    sound = engine.generate(Generation(prompt=PROMPT, max_new_tokens=12))
    ill = engine.generate(Generation(prompt=prompt, max_new_tokens=6))
    assert engine.admit(sound)
    assert engine.admit(ill)
    backend = engine._backend
    assert isinstance(backend, Together)
    engine.step()
    [sequence] = cast(Answering, ill).sequences
    assert sequence.extent is not None
    backend._cache.memory[sequence.extent.start : sequence.extent.end] = torch.nan

    # when they are computed, then one ends and the other goes on
    outputs = engine.step()
    failed = [output for output in outputs if output.work is ill]
    assert [(type(output.item), output.last) for output in failed] == [(Internal, True)]
    computed = [output.item for output in outputs if output.work is sound]
    while engine.load.sequences:
        computed += [output.item for output in engine.step()]
    assert [step.chosen.token for step in computed] == expected[1:]

    # and the next with the same prompt is answered
    assert run(engine, prompt=prompt, max_new_tokens=6).tokens == right


# Sleep


def test_no_prompt_survives_quiescence_and_the_engine_wakes(folder: Path, expected: list[int]) -> None:
    engine = load(folder)
    canary = engine.canary()
    backend = engine._backend
    assert isinstance(backend, Together)
    memory = weakref.ref(backend._cache.memory.untyped_storage())
    scheduler = Scheduler(engine, max_queue=8)
    marker = [53, 59, 61]
    for tail in (" w1", " w2"):
        list(scheduler.submit(engine.generate(Generation(prompt=words(marker * 8) + tail, max_new_tokens=4))))
    assert holders(marker)
    assert engine._prefixes.tokens

    scheduler.call(engine.quiesce)

    assert not holders(marker)
    assert memory() is None
    assert engine.load == Load()
    assert engine._prefixes.tokens == engine._extents.used == 0
    scheduler.call(engine.wake)
    assert engine.canary() == canary
    scheduler.close()
    assert run(engine, prompt=PROMPT, max_new_tokens=12).tokens == expected


def test_answers_go_on_after_a_pause_as_if_there_had_been_none(folder: Path) -> None:
    # given: what several answers are without a pause, some of them drawn and penalised
    engine = load(folder)
    requests: list[dict[str, Any]] = [
        {"prompt": PROMPT, "max_new_tokens": 12},
        {"prompt": words([3, 4, 5]), "max_new_tokens": 20},
        {
            "prompt": words([7, 8]), "max_new_tokens": 16, "temperature": 1.0, "seed": 5,
            "frequency_penalty": 0.5, "n": 2,
        },
    ]  # fmt: skip
    whole = [said(engine, **request) for request in requests]

    # when: they are computed together, and paused between any two steps
    for paused_after in range(1, 14, 3):
        works = [engine.generate(Generation(**request)) for request in requests]
        assert all(engine.admit(work) for work in works)
        collected: dict[int, list[Any]] = {id(work): [] for work in works}
        left, steps = len(works), 0
        while left:
            if steps == paused_after:
                # As on a GPU, where the next step has been launched already.
                engine._flight = engine._launch()
                engine.pause()
                assert engine._unsent
                engine.resume()
            for output in engine.step():
                assert not isinstance(output.item, BaseException)
                collected[id(output.work)].append(output.item)
                left -= output.last
            steps += 1

        # then: no token is lost or doubled
        for work, alone in zip(works, whole, strict=True):
            assert [answer.tokens for answer in answers(work, collected[id(work)])] == alone


def holders(marker: list[int]) -> list[list[int]]:
    """Every list in this process that begins with what only a prompt has."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is list and found[: 3 * 8] == marker * 8]


# Text


class HalfCharacters:
    """Decodes token 1 to "ab" and the beginning of a character."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return "".join("ab\ufffd" if token == 1 else "." for token in tokens)


def test_a_stop_string_in_what_was_held_back_ends_the_answer() -> None:
    sequence = TokenSequence([0], 1, Sampling(), answer=[1])
    work = Answering(cast(Any, HalfCharacters()), Generation(stop=("b",)), [sequence], {})

    [answer] = answers(work, [Step(0, Chosen(1), FinishReason.LENGTH)])

    assert answer.text == "a"
    assert answer.finish == Finish(FinishReason.STOP, prompt_tokens=1, output_tokens=1)


def test_tokens_of_several_steps_are_one_piece(engine: CausalLM, expected: list[int]) -> None:
    work = engine.generate(Generation(prompt=PROMPT, max_new_tokens=12))
    computed = run_all(engine, [work])[work]

    first, *_ = work.receive(computed[:1]).items
    rest, finish = work.receive(computed[1:]).items

    assert (first.token_ids, rest.token_ids) == ((expected[0],), tuple(expected[1:]))
    assert (first.text + rest.text).split() == [WORDS[token] for token in expected]
    assert isinstance(finish, Finish)


def test_what_comes_after_a_stop_string_is_nobodys(engine: CausalLM, expected: list[int]) -> None:
    stop = " " + WORDS[expected[2]]
    work = engine.generate(Generation(prompt=PROMPT, max_new_tokens=12, stop=(stop,)))
    computed = run_all(engine, [work])[work]

    reply = work.receive(computed[:6])

    assert reply.ended
    assert isinstance(reply.items[-1], Finish)
    assert work.receive(computed[6:]).items == []

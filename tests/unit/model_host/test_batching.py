"""Many requests at a time say what each says alone, and what transformers' ``generate`` says."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dumont.errors import Cancelled, DeadlineExceeded, FailedPrecondition, InvalidArgument
from model_host.engine import Generation, Load, Output, Piece, Work
from model_host.engines import causal_lm
from model_host.engines.backends import Alone, Together
from model_host.engines.batch import TokenSequence
from model_host.engines.causal_lm import CausalLM
from model_host.scheduler import Job, Scheduler
from tests.unit.model_host.tiny_models import VOCABULARY, answers, load, save, words

CONTEXT = 512
AUTO: Any = transformers.AutoModelForCausalLM
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "initializer_range": 0.5,
}  # fmt: skip
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
# Shorter than most prompts.
WINDOWED: dict[str, Any] = {**GROUPED, "sliding_window": 16}

ARCHITECTURES: dict[str, tuple[Callable[[], Any], type]] = {
    "Llama": (lambda: transformers.LlamaConfig(**GROUPED), Together),
    "Qwen2": (lambda: transformers.Qwen2Config(**COMMON, num_key_value_heads=2), Together),
    "Qwen3": (lambda: transformers.Qwen3Config(**GROUPED), Together),
    "Mistral": (lambda: transformers.MistralConfig(**WINDOWED), Together),
    "Gemma3": (lambda: transformers.Gemma3TextConfig(**WINDOWED), Together),
    "GPT-NeoX": (lambda: transformers.GPTNeoXConfig(**COMMON, tie_word_embeddings=False), Together),
    "Phi": (lambda: transformers.PhiConfig(**COMMON), Together),
    "GPT-2": (
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=None,
            eos_token_id=None, initializer_range=0.5,
        ),
        Together,
    ),
    "Mixtral": (lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4), Together),
    # Its attention caps scores, which is not computed in batches.
    "Gemma2": (lambda: transformers.Gemma2Config(**WINDOWED), Alone),
    # It has a state instead of keys and values.
    "Mamba": (
        lambda: transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=None,
            eos_token_id=None, pad_token_id=None, initializer_range=0.5,
        ),
        Alone,
    ),
}  # fmt: skip


@dataclass
class Model:
    """An engine, and what transformers itself says."""

    engine: CausalLM
    reference: Any

    def said(self, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def make(name: str, folder: Path, **settings: Any) -> Model:
    config, _ = ARCHITECTURES[name]
    torch.manual_seed(3)
    save(AUTO.from_config(config()), folder)
    return Model(load(folder, **settings), AUTO.from_pretrained(folder).eval())


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@dataclass
class Request:
    """A prompt, and after how many tokens its caller leaves or the answer meets a stop token."""

    prompt: list[int]
    count: int
    leaves_after: int | None = None
    expected: list[int] | None = None
    stop: tuple[int, ...] = ()

    def work(self, engine: CausalLM) -> Work:
        return engine.generate(
            Generation(prompt=words(self.prompt), max_new_tokens=self.count, stop_token_ids=self.stop)
        )


def mixed(model: Model, seed: int, count: int = 16) -> Iterator[Request]:
    """Prompts of one to several hundred tokens, some of which begin alike; some leave, some are stopped."""
    dice = random.Random(seed)
    shared = [dice.randrange(VOCABULARY) for _ in range(60)]
    for number in range(count):
        length = (1, 2, 17, 40, 130, 400)[number % 6]
        prompt = [dice.randrange(VOCABULARY) for _ in range(length)]
        if number % 3 == 0:
            prompt = shared[: dice.randint(20, 60)] + prompt[:60]
        request = Request(prompt, dice.randint(1, 12))
        request.expected = model.said(prompt, request.count)
        if number % 4 == 1:
            request.leaves_after = dice.randrange(request.count)
        elif number % 4 == 2:
            request.stop = (request.expected[dice.randrange(request.count)],)
            request.expected = request.expected[: request.expected.index(request.stop[0])]
        yield request


def drive(engine: CausalLM, requests: list[Request], seed: int) -> list[list[int]]:
    """Let requests in at random while others run, in order; each one's tokens."""
    dice = random.Random(seed)
    works = [request.work(engine) for request in requests]
    waiting = list(range(len(works)))
    computed: dict[Work, list[Any]] = defaultdict(list)
    running: dict[Work, Request] = {}
    while waiting or running:
        for _ in range(dice.randint(0, 3)):
            if waiting and engine.admit(works[waiting[0]]):
                index = waiting.pop(0)
                running[works[index]] = requests[index]
        for output in engine.step() if running else ():
            computed[output.work].append(output.item)
            if output.last:
                del running[output.work]
        for work, request in list(running.items()):
            if request.leaves_after is not None and len(computed[work]) >= request.leaves_after:
                engine.drop(work)
                del running[work]
    assert engine.load.sequences == engine.load.kv_tokens == 0
    return [answers(work, computed[work])[0].tokens for work in works]


def test_each_says_what_it_says_alone_and_what_transformers_says(
    model: Model, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, name = model.engine, request.node.callspec.params["model"]
    assert type(engine._backend) is ARCHITECTURES[name][1]
    assert bool(engine.capacity.unbatched_reason) == (ARCHITECTURES[name][1] is Alone)
    # given few rows, so that prompts come in pieces beside answers
    monkeypatch.setattr(engine._backend, "rows", 96)
    monkeypatch.setattr(engine._backend, "prompt_rows", 32)
    requests = list(mixed(model, seed=1))

    # when they run together, come and go
    found = drive(engine, requests, seed=2)

    # then each has its own tokens
    for asked, tokens in zip(requests, found, strict=True):
        assert asked.expected is not None
        if asked.leaves_after is None:
            assert tokens == asked.expected
        else:
            assert len(tokens) >= min(asked.leaves_after, len(asked.expected))
            assert tokens == asked.expected[: len(tokens)]


def test_each_says_what_it_says_alone_however_often_it_is_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given room for few of those who come, and answers that outgrow their first room again and again
    monkeypatch.setattr(causal_lm, "FIRST_ROOM", 1)
    model = make("Llama", tmp_path, kv_cache=720 * 2 * 2 * 2 * 8 * 4)
    requests = list(mixed(model, seed=3, count=24))
    for request in requests[::2]:
        request.count, request.stop = 70, ()
        request.expected = model.said(request.prompt, request.count)
    paused = 0
    pause = model.engine._pause

    def counted(sequence: TokenSequence) -> None:
        nonlocal paused
        paused += 1
        pause(sequence)

    monkeypatch.setattr(model.engine, "_pause", counted)

    found = drive(model.engine, requests, seed=4)

    assert paused > 1
    for asked, tokens in zip(requests, found, strict=True):
        assert asked.expected is not None
        assert tokens == asked.expected[: len(tokens)]
        assert asked.leaves_after is not None or tokens == asked.expected


def test_a_model_that_no_way_computes_right_is_refused(tmp_path: Path) -> None:
    # given a model that has no cache
    config = transformers.OpenAIGPTConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=CONTEXT
    )
    torch.manual_seed(3)
    save(AUTO.from_config(config), tmp_path)

    with pytest.raises(FailedPrecondition) as refused:
        load(tmp_path)

    assert (refused.value.reason, refused.value.field) == ("MODEL_UNSUPPORTED", "model")


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ROPES))
def test_stretched_positions_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    # given positions that are stretched, and prompts on both sides of where that begins
    config = transformers.LlamaConfig(**GROUPED, rope_parameters={"rope_theta": 10_000.0, **ROPES[kind]})
    torch.manual_seed(3)
    save(AUTO.from_config(config), tmp_path)
    model = Model(load(tmp_path), AUTO.from_pretrained(tmp_path).eval())
    requests = list(mixed(model, seed=3, count=6))

    found = drive(model.engine, requests, seed=4)

    assert [tokens for tokens, asked in zip(found, requests, strict=True) if asked.leaves_after is None] == [
        asked.expected for asked in requests if asked.leaves_after is None
    ]


def test_the_context_ends_where_long_rope_would_change_what_is_in_the_cache(tmp_path: Path) -> None:
    # given positions that all change once there are more than 64
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [9.0, 7.0, 5.0, 3.0],
    }  # fmt: skip
    config = transformers.Phi3Config(
        **GROUPED | {"pad_token_id": 0}, original_max_position_embeddings=64, rope_parameters=rope
    )
    torch.manual_seed(3)
    save(AUTO.from_config(config), tmp_path)
    model = Model(load(tmp_path), AUTO.from_pretrained(tmp_path).eval())

    # then an answer is right up to there, and ends there
    assert model.engine.context_length == 64
    prompt = list(range(50))
    request = Request(prompt, 40)
    [found] = drive(model.engine, [request], seed=4)
    assert found == model.said(prompt, 14)

    # and a longer prompt is refused
    with pytest.raises(InvalidArgument) as refused:
        Request(prompt + prompt, 1).work(model.engine)
    assert refused.value.reason == "PROMPT_TOO_LONG"
    assert refused.value.metadata["context_length"] == "64"


def test_a_model_that_fails_with_every_cache_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    config = transformers.MiniMaxConfig(**GROUPED, num_local_experts=2)
    torch.manual_seed(3)
    save(AUTO.from_config(config), tmp_path)

    with pytest.raises(FailedPrecondition, match="MiniMaxForCausalLM") as refused:
        load(tmp_path)

    assert refused.value.reason == "MODEL_UNSUPPORTED"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_callers_who_leave_or_are_late_change_nothing_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given more callers than have room, of whom some leave and some have little time
    model = make("Llama", tmp_path, kv_cache=1200 * 2 * 2 * 2 * 8 * 4)
    clock = Clock()
    scheduler = Scheduler(model.engine, max_queue=100, clock=clock)
    requests = list(mixed(model, seed=5, count=24))
    leaving, late = range(1, 24, 4), range(2, 24, 6)
    works = [request.work(model.engine) for request in requests]
    deadlines = [1.0 if number in late else None for number in range(len(works))]
    step, steps = model.engine.step, 0
    jobs: list[Job] = []

    def counted() -> Sequence[Output]:
        nonlocal steps
        steps += 1
        if steps == 3:
            for number in leaving:
                jobs[number].cancel()
        if steps == 5:
            clock.now = 1.0
        return step()

    # when they run together
    monkeypatch.setattr(model.engine, "step", counted)
    scheduler.call(lambda: jobs.extend(map(scheduler.submit, works, deadlines)))
    found: list[list[int]] = []
    ends: list[type[Exception] | None] = []
    for job in jobs:
        tokens: list[int] = []
        end: type[Exception] | None = None
        try:
            for item in job:
                tokens += item.token_ids if isinstance(item, Piece) else ()
        except (Cancelled, DeadlineExceeded) as stopped:
            end = type(stopped)
        found.append(tokens)
        ends.append(end)
    scheduler.close()

    # then those who stayed have all their tokens, and the others none that is wrong
    for request, tokens, end in zip(requests, found, ends, strict=True):
        assert request.expected is not None
        assert tokens == (request.expected if end is None else request.expected[: len(tokens)])
    assert {number for number, end in enumerate(ends) if end is Cancelled} <= {*leaving}
    assert {number for number, end in enumerate(ends) if end is DeadlineExceeded} <= {*late}
    assert ends.count(Cancelled) >= 3
    assert ends.count(DeadlineExceeded) >= 2
    # and nothing is left of anybody
    assert model.engine.load == Load()

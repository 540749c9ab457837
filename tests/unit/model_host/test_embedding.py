"""Embeddings of several callers are computed together, and each is what it is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from dumont import limits
from dumont.errors import FailedPrecondition, Internal, InvalidArgument
from dumont.model_host.v1.model_host_service_pb2 import EmbedResponse
from model_host import model_files
from model_host.engine import Embedded, Generation, Load, Phases, Settings, Work
from model_host.engines import embedding
from model_host.engines.embedding import BATCH, Embedding
from model_host.scheduler import Scheduler
from tests.unit.model_host.tiny_models import VOCABULARY, save

CONTEXT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=CONTEXT, initializer_range=0.5,
    )  # fmt: skip
    return save(BertModel(config), tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Embedding:
    return embedding.load(model_files.read(folder), Settings(device="cpu", threads=1), Phases())


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The mean of a text's states, computed by transformers alone."""
    model: Any = BertModel.from_pretrained(folder)
    model.eval()

    def embed(text: str) -> list[float]:
        ids = torch.tensor([[int(word[1:]) for word in text.split()]])
        mean: list[float] = model(ids).last_hidden_state[0].mean(0).tolist()
        return mean

    return embed


def text(seed: int, length: int) -> str:
    return " ".join(f"w{(7 * seed + 3 * place) % VOCABULARY}" for place in range(length))


def run_all(engine: Embedding, works: list[Work]) -> dict[Work, list[Embedded]]:
    for work in works:
        assert engine.admit(work)
    computed: dict[Work, list[Embedded]] = {work: [] for work in works}
    while engine.load.sequences:
        for output in engine.step():
            computed[output.work].append(output.item)
    return computed


def vectors(work: Work, computed: list[Embedded]) -> list[list[float]]:
    found: list[list[float]] = []
    for item in work.receive(computed).items:
        assert item.first == len(found)
        found += item.embeddings
    return found


def test_texts_of_all_callers_are_computed_together_and_each_as_alone(engine: Embedding, plain: Any) -> None:
    # given callers with one text, several of all lengths, and more than a step takes
    asked = [
        [text(1, 5)],
        [text(2, 1), text(3, CONTEXT), text(4, 9)],
        [text(number, 1 + number % 12) for number in range(BATCH + 5)],
        [text(5, 3)],
    ]
    works = [engine.embed(inputs) for inputs in asked]

    computed = run_all(engine, works)

    for inputs, work in zip(asked, works, strict=True):
        found = torch.tensor(vectors(work, computed[work]))
        torch.testing.assert_close(found, torch.tensor([plain(one) for one in inputs]), rtol=1e-4, atol=1e-5)
        assert sum(item.prompt_tokens for item in computed[work]) == sum(len(i.split()) for i in inputs)
    # 26 texts in two steps of 16: the third caller's are in both, the last's come in the second.
    assert [len(computed[work]) for work in works] == [1, 1, 2, 1]


def test_a_caller_who_leaves_takes_nobody_along(engine: Embedding, plain: Any) -> None:
    leaving = engine.embed([text(number, 4) for number in range(2 * BATCH)])
    staying = engine.embed([text(7, 4)])
    assert engine.admit(leaving)
    assert engine.admit(staying)
    engine.step()

    engine.drop(leaving)
    engine.drop(leaving)
    [output] = engine.step()

    assert (output.work, output.last) == (staying, True)
    assert output.item.embeddings[0] == pytest.approx(plain(text(7, 4)), rel=1e-4, abs=1e-5)
    assert engine.load == Load()


def test_callers_of_a_scheduler_get_their_own(engine: Embedding, plain: Any) -> None:
    scheduler = Scheduler(engine, max_queue=100)
    asked = [[text(number, 2 + number % 7) for number in range(start, start + 3)] for start in range(20)]

    jobs = [scheduler.submit(engine.embed(inputs)) for inputs in asked]
    found = [[vector for item in job for vector in item.embeddings] for job in jobs]
    scheduler.close()

    for inputs, given in zip(asked, found, strict=True):
        expected = torch.tensor([plain(one) for one in inputs])
        torch.testing.assert_close(torch.tensor(given), expected, rtol=1e-4, atol=1e-5)


def test_no_more_callers_are_let_in_than_there_is_room_for(engine: Embedding) -> None:
    works = [engine.embed(["w1"]) for _ in range(engine.capacity.sequences + 1)]
    admitted = [engine.admit(work) for work in works]

    assert admitted == [True] * engine.capacity.sequences + [False]
    for work in works:
        engine.drop(work)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [([], "EMPTY_INPUTS"), (["w1", ""], "EMPTY_INPUT"), (["w1 " * 41], "PROMPT_TOO_LONG")],
)
def test_wrong_inputs_are_refused_by_name(engine: Embedding, inputs: list[str], reason: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        engine.embed(inputs)
    assert refused.value.reason == reason
    assert (refused.value.field or "").startswith("inputs")


def test_more_vectors_than_an_answer_takes_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    # given a model of 2,048 values, of which an answer has room for 510 vectors
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=2048, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=8, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    folder = save(BertModel(config), tmp_path)
    wide = embedding.load(model_files.read(folder), Settings(device="cpu", threads=1), Phases())

    with pytest.raises(InvalidArgument) as refused:
        wide.embed(["w1"] * 511)

    # then it says how many do fit
    assert (refused.value.reason, refused.value.field) == ("TOO_MANY_INPUTS", "inputs")
    assert refused.value.metadata == {"limit": "509", "value": "511"}
    assert "at most 509 inputs" in refused.value.message
    assert wide.load == Load()

    # and so many fit, whatever their values are
    response = EmbedResponse()
    for _ in range(509):
        response.embeddings.add(values=[0.1] * 2048)
    assert len(wide.embed(["w1"] * 509).receive([]).items) == 0
    assert limits.ANSWER_BYTES - 100_000 < response.ByteSize() < limits.ANSWER_BYTES


def test_a_vector_that_is_no_number_ends_one_call_alone(engine: Embedding, plain: Any) -> None:
    # given two callers, of whom one's text meets a token without a vector
    ill, sound = engine.embed([text(1, 3), "w5"]), engine.embed([text(2, 4)])
    weight = engine._model.embeddings.word_embeddings.weight
    before = weight[5].clone()
    assert engine.admit(ill)
    assert engine.admit(sound)
    try:
        weight.data = weight.data.clone()
        weight.data[5] = torch.nan
        outputs = engine.step()
    finally:
        weight.data[5] = before

    # then that one is told so, and the other has its own
    failed = [output for output in outputs if output.work is ill]
    assert [(type(output.item), output.last) for output in failed] == [(Internal, True)]
    assert failed[0].item.reason == "NOT_A_NUMBER"
    [right] = [output for output in outputs if output.work is sound]
    assert right.item.embeddings[0] == pytest.approx(plain(text(2, 4)), rel=1e-4, abs=1e-5)
    assert engine.load == Load()


def test_it_does_not_generate(engine: Embedding) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        engine.generate(Generation(prompt="w1"))
    assert refused.value.reason == "ENGINE_CANNOT_GENERATE"


def test_it_says_the_same_after_it_slept(engine: Embedding) -> None:
    engine.warm_up()
    canary = engine.canary()

    engine.quiesce()
    engine.wake()

    assert engine.canary() == canary
    assert engine.load == Load()

"""The engine of vLLM over a core that says what it is told to: no vLLM is needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from dumont.errors import FailedPrecondition, Internal, InvalidArgument
from model_host import model_files
from model_host.delivery import Extent, extents
from model_host.engine import (
    Canary,
    Capacity,
    DeviceLost,
    Embedded,
    Finish,
    FinishReason,
    Generation,
    Output,
    Phases,
    Settings,
    Work,
)
from model_host.engines import choice, sentence
from model_host.engines.sampling import Chosen, Sampling
from model_host.engines.sentence import Dense, Recipe
from model_host.engines.tokens import load_tokenizer
from model_host.engines.vllm import engine as engines
from model_host.engines.vllm import sleep, surroundings, versions
from model_host.engines.vllm.engine import Embedder, Generator
from model_host.engines.vllm.sleep import Piece
from model_host.engines.vllm.versions import Computed, Core
from model_host.model_files import ModelFiles
from model_host.weights import map_shards
from tests.unit.model_host.tiny_models import VOCABULARY, answers, llama, words

END = 7


@dataclass
class Asked:
    """A request as the core was given it."""

    prompt: list[int]
    limit: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    shared: bool = True


@dataclass
class ScriptedCore:
    """A vLLM whose steps are given."""

    steps: list[list[Computed] | Exception] = field(default_factory=list)
    asked: dict[str, Asked] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    forgotten: int = 0
    context_length: int = 40
    vocabulary: int = VOCABULARY
    sequences: int = 4
    kv_tokens: int | None = 400
    kv_tokens_used: int = 30

    def request(
        self, prompt: list[int], limit: int, sampling: Sampling, seed: int | None, *, shared: bool = True
    ) -> Asked:
        return Asked(prompt, limit, sampling, seed, shared)

    def pooling_request(self, tokens: list[int], *, normalize: bool) -> Asked:
        return Asked(tokens)

    def add(self, request: Asked) -> str:
        self.asked[str(len(self.asked))] = request
        return str(len(self.asked) - 1)

    def abort(self, requests: Sequence[str]) -> None:
        self.aborted += requests

    def step(self) -> Iterator[Computed]:
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        yield from step

    def forget(self) -> None:
        self.forgotten += 1


@dataclass
class Sleeping:
    """A memory that tells when it was given up."""

    asleep: bool = False

    def suspend(self) -> None:
        self.asleep = True

    def resume(self) -> None:
        self.asleep = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = llama(tmp_path_factory.mktemp("tiny"))
    (place / "generation_config.json").write_text(f'{{"eos_token_id": {END}}}')
    return place


@pytest.fixture
def core() -> ScriptedCore:
    return ScriptedCore()


@pytest.fixture
def generator(folder: Path, core: ScriptedCore) -> Generator:
    files = model_files.read(folder)
    tokenizer = load_tokenizer(files)
    settings = Settings(max_new_tokens_limit=100)
    return Generator(cast(Core, core), cast(Any, Sleeping()), tokenizer, files, settings, "cpu")


@pytest.fixture
def embedder(folder: Path, core: ScriptedCore) -> Embedder:
    files = model_files.read(folder)
    return Embedder(cast(Core, core), cast(Any, Sleeping()), load_tokenizer(files), files, Settings(), "cpu")


def tokens(request: str, *ids: int, ended: bool = False, cached: int | None = None) -> Computed:
    return Computed(request, tuple(map(Chosen, ids)), cached, ended)


def admitted(generator: Generator, **fields: Any) -> Work:
    work = generator.generate(Generation(**fields))
    assert generator.admit(work)
    return work


def items(outputs: Sequence[Output], work: Work) -> list[Any]:
    return [output.item for output in outputs if output.work is work]


def test_a_request_reaches_vllm_with_every_setting(generator: Generator, core: ScriptedCore) -> None:
    admitted(
        generator, prompt=words([1, 2]), max_new_tokens=5, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1,
        repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4, logit_bias={5: 1.0},
        stop_token_ids=(9,), min_new_tokens=2, logprobs=1, seed=11, n=2,
    )  # fmt: skip

    assert [asked.seed for asked in core.asked.values()] == [11, 12]
    for asked in core.asked.values():
        assert (asked.prompt, asked.limit, asked.shared) == ([1, 2], 5, True)
        assert asked.sampling == Sampling(
            temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition=1.2, presence=0.3, frequency=0.4,
            bias={5: 1.0}, ends=frozenset({END, 9}), min_new_tokens=2, logprobs=1,
        )  # fmt: skip


def test_tokens_become_the_text_that_other_engines_would_make(
    generator: Generator, core: ScriptedCore
) -> None:
    work = admitted(generator, prompt=words([1, 2, 3]), max_new_tokens=3)
    core.steps = [[tokens("0", 4, cached=2)], [], [tokens("0", 5)], [tokens("0", 6, ended=True)]]

    outputs = [output for _ in range(4) for output in generator.step()]

    [answer] = answers(work, items(outputs, work))
    assert answer.text.split() == ["w4", "w5", "w6"]
    assert answer.finish == Finish(FinishReason.LENGTH, 3, 3, cached_prompt_tokens=2)
    assert [output.last for output in outputs] == [False, False, True]
    assert generator.load.sequences == 0


@pytest.mark.parametrize(
    ("end", "fields", "reason"),
    [(END, {}, FinishReason.END), (9, {"stop_token_ids": (9,)}, FinishReason.STOP)],
)
def test_a_token_that_ends_the_answer_is_not_part_of_it(
    generator: Generator, core: ScriptedCore, end: int, fields: dict[str, Any], reason: FinishReason
) -> None:
    work = admitted(generator, prompt=words([1]), max_new_tokens=9, **fields)
    core.steps = [[tokens("0", 4)], [tokens("0", end, ended=True)]]

    outputs = [*generator.step(), *generator.step()]

    [answer] = answers(work, items(outputs, work))
    assert answer.tokens == [4]
    assert answer.finish == Finish(reason, 1, 1)
    assert core.aborted == []


def test_vllm_is_told_of_an_end_that_it_does_not_know(generator: Generator, core: ScriptedCore) -> None:
    # given: several tokens at once, as with speculative decoding, of which the second is the last wanted
    work = admitted(generator, prompt=words([1]), max_new_tokens=2)
    core.steps = [[tokens("0", 4, 5, 6)]]

    outputs = generator.step()

    assert answers(work, items(outputs, work))[0].tokens == [4, 5]
    assert core.aborted == ["0"]


def test_an_answer_for_which_vllm_has_no_more_room_ends(generator: Generator, core: ScriptedCore) -> None:
    work = admitted(generator, prompt=words([1]), max_new_tokens=20)
    core.steps = [[tokens("0", 4, ended=True)]]

    outputs = generator.step()

    assert answers(work, items(outputs, work))[0].finish == Finish(FinishReason.LENGTH, 1, 1)
    assert outputs[-1].last


def test_answers_of_one_request_end_one_by_one(generator: Generator, core: ScriptedCore) -> None:
    work = admitted(generator, prompt=words([1]), max_new_tokens=2, n=2)
    core.steps = [
        [tokens("0", 4), tokens("1", 5)],
        [tokens("1", END, ended=True)],
        [tokens("0", 6, ended=True)],
    ]

    outputs = [output for _ in range(3) for output in generator.step()]

    first, second = answers(work, items(outputs, work))
    assert (first.tokens, second.tokens) == ([4, 6], [5])
    assert [output.last for output in outputs] == [False, False, False, True]


def test_a_dropped_request_is_aborted_and_the_other_goes_on(generator: Generator, core: ScriptedCore) -> None:
    dropped = admitted(generator, prompt=words([1]), max_new_tokens=9)
    stays = admitted(generator, prompt=words([2]), max_new_tokens=9)

    generator.drop(dropped)
    generator.drop(dropped)

    # then: what vLLM had computed for it meanwhile reaches nobody
    core.steps = [[tokens("0", 4), tokens("1", 5)]]
    assert [output.work for output in generator.step()] == [stays]
    assert core.aborted == ["0"]
    assert generator.load.sequences == 1


def test_what_vllm_gives_up_is_an_error_of_its_caller_alone(generator: Generator, core: ScriptedCore) -> None:
    ill = admitted(generator, prompt=words([1]), max_new_tokens=9)
    well = admitted(generator, prompt=words([2]), max_new_tokens=9)
    core.steps = [[Computed("0", ended=True, failed="error"), tokens("1", 5)]]

    outputs = generator.step()

    [failure] = items(outputs, ill)
    assert isinstance(failure, Internal)
    assert failure.reason == "COMPUTE_FAILED"
    assert len(items(outputs, well)) == 1


def test_a_step_that_fails_is_the_end_of_the_process(generator: Generator, core: ScriptedCore) -> None:
    admitted(generator, prompt=words([1]), max_new_tokens=9)
    core.steps = [RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with …")]

    with pytest.raises(DeviceLost) as lost:
        generator.step()
    assert str(lost.value) == "vLLM failed: CUDA error: an illegal memory access was encountered"


def test_requests_wait_while_as_many_as_fit_are_under_way(generator: Generator) -> None:
    admitted(generator, prompt=words([1]), max_new_tokens=9, n=3)

    assert not generator.admit(generator.generate(Generation(prompt=words([2]), n=2)))
    assert generator.admit(generator.generate(Generation(prompt=words([2]))))
    assert generator.capacity == Capacity(4, 400)
    assert (generator.load.sequences, generator.load.kv_tokens) == (4, 30)


def test_more_answers_than_fit_are_admitted_alone(generator: Generator) -> None:
    # vLLM computes them in turn.
    assert generator.admit(generator.generate(Generation(prompt=words([2]), n=6)))


def test_the_warm_up_ends_where_one_answer_is_computed_at_a_time(folder: Path) -> None:
    core = ScriptedCore(sequences=1, steps=[[tokens(str(number), 4, ended=True)] for number in range(4)])
    files = model_files.read(folder)
    generator = Generator(
        cast(Core, core), cast(Any, Sleeping()), load_tokenizer(files), files, Settings(), "cpu"
    )

    generator.warm_up()

    assert len(core.asked) == 4
    assert (core.steps, generator.load.sequences) == ([], 0)


def test_an_answer_need_not_be_longer_than_it_may_be(
    folder: Path, core: ScriptedCore, tmp_path: Path
) -> None:
    # given: a model whose answers have 20 tokens at least, for a caller who wants 5, which vLLM refuses
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {END}, "min_new_tokens": 20}}')
    files = model_files.read(model)
    generator = Generator(
        cast(Core, core), cast(Any, Sleeping()), load_tokenizer(files), files, Settings(), "cpu"
    )

    admitted(generator, prompt=words([1]), max_new_tokens=5)

    assert core.asked["0"].sampling.min_new_tokens == core.asked["0"].limit == 5


def test_a_prompt_that_is_too_long_is_refused_by_name(generator: Generator) -> None:
    with pytest.raises(InvalidArgument) as refused:
        generator.generate(Generation(prompt=words([1] * 40)))
    assert refused.value.reason == "PROMPT_TOO_LONG"


def test_the_canary_is_computed_anew_and_leaves_nothing(generator: Generator, core: ScriptedCore) -> None:
    core.steps = [
        [Computed("0", (Chosen(3, -0.5),), 0)],
        [Computed("0", (Chosen(4, -0.123456),), ended=True)],
    ]

    assert generator.canary() == Canary([3, 4], -0.1235)
    assert not core.asked["0"].shared
    assert core.forgotten == 1


def test_a_sleeping_engine_has_forgotten_prompts_and_given_its_memory_up(
    generator: Generator, core: ScriptedCore
) -> None:
    memory = cast(Any, generator)._memory

    generator.quiesce()
    assert (core.forgotten, memory.asleep) == (1, True)

    generator.wake()
    assert not memory.asleep


def test_a_model_that_generates_does_not_embed_and_the_other_way_round(
    generator: Generator, embedder: Embedder
) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        generator.embed(["w1"])
    assert refused.value.reason == "ENGINE_CANNOT_EMBED"
    with pytest.raises(FailedPrecondition) as refused:
        embedder.generate(Generation(prompt="w1"))
    assert refused.value.reason == "ENGINE_CANNOT_GENERATE"


def test_vectors_are_given_out_in_the_order_of_their_texts(embedder: Embedder, core: ScriptedCore) -> None:
    work = embedder.embed([words([1]), words([2, 3]), words([4])])
    assert embedder.admit(work)
    # given: the second is computed first
    core.steps = [
        [Computed("1", ended=True, vector=[0.2])],
        [Computed("0", ended=True, vector=[0.1]), Computed("2", ended=True, vector=[0.3])],
    ]

    assert embedder.step() == []
    outputs = embedder.step()

    assert items(outputs, work) == [Embedded([[0.1], [0.2]], 3, 0), Embedded([[0.3]], 1, 2)]
    assert [output.last for output in outputs] == [False, True]
    assert embedder.load.sequences == 0


def test_dropped_texts_are_aborted(embedder: Embedder, core: ScriptedCore) -> None:
    work = embedder.embed([words([1]), words([2])])
    embedder.admit(work)

    embedder.drop(work)

    assert core.aborted == ["0", "1"]


# What it is given


def arguments(folder: Path, options: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    files = model_files.read(folder)
    settings = Settings(kv_cache=1 << 20, engine_options=options)
    lora = options.pop("lora_modules", None)
    return engines._arguments(files, settings, device, generates=True, options=options, lora=lora)


def test_options_replace_defaults_but_not_what_dumont_decides(folder: Path) -> None:
    given = arguments(folder, {"max_num_seqs": 3, "max_model_len": 20})

    assert (given["max_num_seqs"], given["max_model_len"]) == (3, 20)
    assert given["model"] == str(folder)
    assert given["skip_tokenizer_init"]
    assert not given["enable_sleep_mode"]


def test_the_kv_cache_has_the_size_that_the_deployment_or_the_node_says(folder: Path) -> None:
    assert arguments(folder, {})["kv_cache_memory_bytes"] == 1 << 20
    assert "kv_cache_memory_bytes" not in arguments(folder, {"gpu_memory_utilization": 0.5})


def test_an_adapter_turns_lora_on(folder: Path) -> None:
    assert arguments(folder, {"lora_modules": {"mine": "/a"}})["enable_lora"]
    assert "enable_lora" not in arguments(folder, {})


def test_a_generating_architecture_generates_unless_its_files_make_it_a_sentence_model(
    folder: Path,
) -> None:
    files = model_files.read(folder)
    assert engines._generates(files)
    assert not engines._generates(replace(files, names=files.names | {"modules.json"}))


def test_without_modules_the_mean_is_taken_as_by_the_engine_embedding(folder: Path) -> None:
    files = model_files.read(folder)
    with_modules = replace(files, names=files.names | {"modules.json"})

    def pooler(files: ModelFiles, *, generates: bool) -> Any:
        return engines._arguments(files, Settings(), "cpu", generates, {}, None).get("pooler_config")

    assert pooler(files, generates=False) == {"pooling_type": "MEAN"}
    assert pooler(with_modules, generates=False) is None
    assert pooler(files, generates=True) is None


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (Recipe(modes=("max",)), "pool"),
        (Recipe(modes=("mean", "cls")), "pool"),
        (Recipe(after=(nn.LayerNorm(2),)), "LayerNorm"),
        (Recipe(after=(Dense(nn.Linear(2, 2), nn.Tanh(), nn.Identity()),)), "residual"),
        (Recipe(prompt="query: ", prompt_counts=False), "prompt"),
    ],
)
def test_a_model_whose_vectors_vllm_would_make_otherwise_is_refused_before_it_is_loaded(
    folder: Path, recipe: Recipe, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentence, "read", lambda files: recipe)
    monkeypatch.setattr(engines, "_device", lambda name: "cpu")
    monkeypatch.setattr(engines, "_generates", lambda files: False)

    with pytest.raises(FailedPrecondition) as refused:
        engines.load(model_files.read(folder), Settings(), Phases())

    assert refused.value.reason == "MODEL_UNSUPPORTED"
    assert why in refused.value.message
    assert "engine embedding" in refused.value.message


def test_without_vllm_the_remedy_is_named(folder: Path) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        choice.load("vllm", model_files.read(folder), Settings(), Phases())
    assert refused.value.reason == "ENGINE_MISSING"
    assert "dumont engine install vllm" in refused.value.message


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.32.0+cpu"])
def test_tested_versions_are_taken_silently(version: str, caplog: pytest.LogCaptureFixture) -> None:
    versions.check(version)
    assert caplog.text == ""


@pytest.mark.parametrize("version", ["0.25.9", "0.9.1"])
def test_versions_that_cannot_sleep_are_refused(version: str) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        versions.check(version)
    assert refused.value.reason == "ENGINE_TOO_OLD"


def test_an_unknown_version_is_tried_and_said_to_be_untested(caplog: pytest.LogCaptureFixture) -> None:
    versions.check("0.40.1")
    assert "0.40.1 is untested" in caplog.text


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*surroundings.VARIABLES, *surroundings.CACHES, "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.setenv(name, "")
    for name in ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(surroundings, "_caches", None)


def test_caches_are_private_and_leave_no_file(variables: None) -> None:
    surroundings.prepare(Settings(threads=3))

    places = {Path(os.environ[name]) for name in surroundings.CACHES}
    assert len(places) == len(surroundings.CACHES)
    [root] = {place.parent for place in places}
    assert root.stat().st_mode & 0o777 == 0o700
    assert os.environ["OMP_NUM_THREADS"] == "3"
    surroundings.forget_caches()
    assert not root.exists()


# Weights


def test_fused_weights_are_found_in_the_files_of_the_model(folder: Path) -> None:
    files = model_files.read(folder)
    tensors = map_shards(files.shards)
    layer = "model.layers.0.self_attn."
    names = [f"{layer}{part}_proj.weight" for part in "qkv"]
    memory = torch.cat([tensors[name].view(-1).view(torch.uint8) for name in names])

    found, rest = sleep.match(memory, tensors, sleep._index(tensors))

    assert [name for _, name, _ in found] == names
    sizes = [tensors[name].nbytes for name in names]
    assert [at for at, _, _ in found] == [0, sizes[0], sizes[0] + sizes[1]]
    assert rest == []


def test_what_is_in_no_file_is_kept_byte_for_byte(folder: Path) -> None:
    tensors = map_shards(model_files.read(folder).shards)
    known = tensors["model.norm.weight"].view(torch.uint8)
    table = torch.arange(200, dtype=torch.uint8)

    found, rest = sleep.match(torch.cat([known, table]), tensors, sleep._index(tensors))

    assert [size for _, _, size in found] == [known.numel()]
    assert rest == [(known.numel(), known.numel() + 200)]
    assert sleep.match(table, tensors, sleep._index(tensors)) == ([], [(0, 200)])


def test_a_tensor_that_only_begins_like_one_of_a_file_is_not_taken_for_it(folder: Path) -> None:
    tensors = map_shards(model_files.read(folder).shards)
    changed = tensors["lm_head.weight"].clone().view(-1).view(torch.uint8)
    changed[-1] ^= 1

    found, rest = sleep.match(changed, tensors, sleep._index(tensors))

    assert (found, rest) == ([], [(0, changed.numel())])


def test_neighbours_in_file_and_memory_are_ordered_as_one_piece() -> None:
    file, other = Path("/a"), Path("/b")
    where = {
        "one": Extent(file, 100, 10), "two": Extent(file, 110, 5), "gap": Extent(file, 200, 5),
        "elsewhere": Extent(other, 115, 7),
    }  # fmt: skip
    pieces = [Piece(15, "gap", 5), Piece(0, "one", 10), Piece(10, "two", 5), Piece(20, "elsewhere", 7)]

    assert list(sleep._joined(pieces, where)) == [
        ("/a", 100, 15, 0), ("/a", 200, 5, 15), ("/b", 115, 7, 20),
    ]  # fmt: skip


def test_all_weights_of_a_model_are_pieces_of_its_files(folder: Path) -> None:
    files = model_files.read(folder)
    tensors = map_shards(files.shards)
    memory = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()])

    found, rest = sleep.match(memory, tensors, sleep._index(tensors))

    assert rest == []
    assert sum(size for _, _, size in found) == sum(one.size for one in extents(files.shards).values())


def test_pages_of_the_kv_cache_are_given_back_and_read_as_zeros() -> None:
    memory = sleep.CpuMemory()
    cache = torch.ones(1 << 20, dtype=torch.uint8)
    memory.settle(cast(Any, type("Core", (), {"kv_tensors": lambda self: [cache]})()))

    # All but the two pages at its ends, which it may share with others.
    assert int(cache.sum()) <= 2 * os.sysconf("SC_PAGESIZE")


@dataclass
class HostAllocation(sleep.Allocation):
    """An allocation in host memory."""

    memory: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def view(self, place: int, size: int) -> torch.Tensor:
        return self.memory[place : place + size]


def test_an_allocation_comes_back_with_what_is_in_no_file(folder: Path) -> None:
    # given: a weight of the model, a table, zeros, and bytes that belong to nobody
    tensors = map_shards(model_files.read(folder).shards)
    weight = tensors["lm_head.weight"].view(-1).view(torch.uint8)
    table = torch.arange(1, 101, dtype=torch.uint8)
    parts = [weight, table, torch.zeros(50, dtype=torch.uint8), torch.full((30,), 9, dtype=torch.uint8)]
    places = [0, weight.numel(), weight.numel() + 100, weight.numel() + 150]
    allocation = HostAllocation((0, 0, 0, 0), memory=torch.cat(parts))

    # when: all but the last is in use, and after a sleep there is other memory
    blocks = [(place, part.numel()) for place, part in zip(places[:3], parts, strict=False)]
    allocation.learn(blocks, tensors, sleep._index(tensors))
    allocation.memory = torch.full_like(allocation.memory, 77)
    allocation.fill()

    # then
    assert [piece.tensor for piece in allocation.pieces] == ["lm_head.weight"]
    assert torch.equal(allocation.memory[places[1] : places[2]], table)
    assert int(allocation.memory[places[2] : places[3]].sum()) == 0
    assert set(allocation.memory[: places[1]].tolist()) == {77}
    assert set(allocation.memory[places[3] :].tolist()) == {77}


def test_an_allocation_is_ordered_from_the_files_that_its_weights_are_in(folder: Path) -> None:
    files = model_files.read(folder)
    memory = sleep.GpuMemory(files, Settings())
    memory._extents = extents(files.shards)
    allocation = sleep.Allocation((0, 4 << 20, 0, 0), [Piece(512, "lm_head.weight", 8192)])

    plan = memory._plan(allocation)

    where = memory._extents["lm_head.weight"]
    assert plan.size == 4 << 20
    assert plan.pieces == ((str(where.file), where.offset, 8192, 512),)

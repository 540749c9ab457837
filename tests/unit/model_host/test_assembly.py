"""A model built around mapped weights computes what transformers' own loader would make it compute."""

from __future__ import annotations

import gc
import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

from dumont import models
from dumont.errors import DumontError, FailedPrecondition, InvalidArgument
from model_host import model_files
from model_host.engine import Phases, Settings, WeightsPlace
from model_host.engines import assembly

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
INPUT = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def llama_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(llama_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_source, tmp_path / "model"))


def build(
    folder: Path, device: str = "cpu", weights: WeightsPlace = WeightsPlace.DETACHED
) -> tuple[Any, Any]:
    return assembly.build(model_files.read(folder), Settings(device=device, weights=weights), Phases())


def refusal(folder: Path) -> DumontError:
    with pytest.raises(FailedPrecondition) as refused:
        build(folder)
    assert refused.value.reason == "MODEL_INVALID"
    return refused.value


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        output = model(input_ids=INPUT)
    found: torch.Tensor = output[0]
    return found


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / models.WEIGHTS)
    save_file(change(tensors), folder / models.WEIGHTS, metadata={"format": "pt"})


def maps(folder: Path) -> bool:
    """Whether this process maps a weight file of ``folder``."""
    return any(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def mapped(model: Any) -> bool:
    """Whether every parameter lies in a mapping of a safetensors file."""
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(".safetensors")
    ]
    return all(
        any(start <= parameter.data_ptr() < end for start, end in ranges) for parameter in model.parameters()
    )


def test_it_computes_the_same_from_mapped_files(llama: Path) -> None:
    model, _ = build(llama)

    assert mapped(model)
    assert torch.equal(logits(model), logits(LlamaForCausalLM.from_pretrained(llama, dtype="auto").eval()))


def test_included_weights_are_its_own_and_no_file_stays_mapped(llama: Path) -> None:
    expected = logits(build(llama)[0])

    model, weights = build(llama, weights=WeightsPlace.INCLUDED)
    gc.collect()

    assert not maps(llama)
    assert not weights.detachable
    assert torch.equal(logits(model), expected)


def test_included_weights_are_its_own_also_when_transformers_loads_them(llama: Path) -> None:
    # given: two types of numbers, which is more than mapping can do
    rewrite(llama, lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"].float()})

    model, _ = build(llama, weights=WeightsPlace.INCLUDED)
    gc.collect()

    assert not maps(llama)
    assert logits(model).shape[-1] == SMALL["vocab_size"]


@pytest.mark.parametrize("weights", WeightsPlace)
def test_tied_weights_are_one(llama: Path, weights: WeightsPlace) -> None:
    model, _ = build(llama, weights=weights)

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(value.is_meta for value in chain(model.parameters(), model.buffers()))


def test_shards_make_one_model(llama: Path) -> None:
    # given a checkpoint in two files
    whole = logits(build(llama)[0])
    tensors = load_file(llama / models.WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, llama / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (llama / models.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (llama / models.WEIGHTS).unlink()

    # when it is built
    model, _ = build(llama)

    # then it is the same, still mapped
    assert mapped(model)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_a_checkpoint_with_a_head_fits_the_model_without(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(**SMALL)
    saved: Any = BertForMaskedLM(config) if prefix else BertModel(config)
    saved.save_pretrained(tmp_path)
    if prefix:  # the head has no pooler
        pooler: Any = BertModel(config).pooler
        base = {f"bert.pooler.{name}": value for name, value in pooler.state_dict().items()}
        rewrite(tmp_path, lambda tensors: {**tensors, **base})
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["BertModel"]}))

    model, _ = build(tmp_path)

    assert mapped(model)
    expected = saved.bert if prefix else saved
    assert torch.equal(logits(model), logits(expected.eval()))


def test_mixed_types_are_left_to_the_librarys_loader(llama: Path) -> None:
    rewrite(llama, lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"].float()})

    model, weights = build(llama)

    assert not weights.detachable
    assert torch.equal(logits(model), logits(LlamaForCausalLM.from_pretrained(llama, dtype="auto").eval()))


def test_a_missing_weight_is_refused_not_made_up(llama: Path) -> None:
    def without_norm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}

    rewrite(llama, without_norm)

    assert "model.norm.weight" in refusal(llama).message


def test_a_missing_output_layer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    # given a model whose output layer is its own, in files that do not hold it
    torch.manual_seed(0)
    saved: Any = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    saved.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})

    error = refusal(tmp_path)

    assert "tie_word_embeddings" in error.message
    assert "lm_head.weight" in error.message


def test_an_output_layer_of_its_own_is_taken_though_the_configuration_ties_it(llama: Path) -> None:
    # given files with both, which differ: transformers takes them as they are
    rewrite(
        llama,
        lambda tensors: {
            **tensors, "lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"])
        },
    )  # fmt: skip

    model, _ = build(llama)

    right: Any = LlamaForCausalLM.from_pretrained(llama, dtype="auto").eval()
    assert torch.equal(logits(model), logits(right))
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_code_of_a_models_own_is_named(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    own = {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (llama / "config.json").write_text(json.dumps({**config, **own}))

    with pytest.raises(FailedPrecondition, match="code is in its own repository") as refused:
        build(llama)
    assert refused.value.reason == "MODEL_UNSUPPORTED"


def test_weights_of_another_shape_are_refused(llama: Path) -> None:
    rewrite(llama, lambda tensors: {**tensors, "model.norm.weight": torch.ones(8, dtype=torch.bfloat16)})

    assert "does not fit config.json" in refusal(llama).message


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_named(llama: Path, size: int) -> None:
    file = llama / models.WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[:size])

    assert refusal(llama).metadata == {"file": str(file)}


def test_an_architecture_that_the_library_lacks_is_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "architectures": ["LunarForCausalLM"]}))

    with pytest.raises(FailedPrecondition) as refused:
        build(llama)
    assert refused.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1"])
def test_a_device_that_is_none_is_refused(llama: Path, device: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        build(llama, device)
    assert refused.value.reason == "INVALID_DEVICE"


def test_a_gpu_that_is_not_there_is_refused(llama: Path) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        build(llama, "cuda:99")
    assert refused.value.reason == "DEVICE_MISSING"


@pytest.mark.gpu
def test_weights_leave_the_gpu_and_come_back(llama: Path) -> None:
    model, weights = build(llama, "cuda:0")
    before = {name: value.cpu() for name, value in model.state_dict().items()}

    weights.detach()
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    weights.attach()

    assert all(torch.equal(value.cpu(), before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight

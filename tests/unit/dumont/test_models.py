"""One decision says which engine runs a model; what none can run right is refused, with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dumont import models
from dumont.errors import FailedPrecondition

FILES = frozenset({"config.json", "model.safetensors", "tokenizer.json"})


def config(architecture: str, model_type: str = "", **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **fields}


def refusal(given: Mapping[str, Any], files: frozenset[str] = FILES, asked: str = "") -> str:
    with pytest.raises(FailedPrecondition) as refused:
        models.engine_of("org/name", given, files, asked)
    assert (refused.value.reason, refused.value.field) == ("MODEL_UNSUPPORTED", "model")
    assert "'org/name'" in refused.value.message
    return refused.value.message


@pytest.mark.parametrize(
    ("architecture", "model_type", "engine"),
    [
        ("LlamaForCausalLM", "llama", "causal_lm"),
        ("GPT2LMHeadModel", "gpt2", "causal_lm"),
        ("BertGenerationDecoder", "bert-generation", "causal_lm"),
        ("BertModel", "bert", "embedding"),
        ("XLMRobertaModel", "xlm-roberta", "embedding"),
        ("BertForMaskedLM", "bert", "embedding"),
        ("BertForPreTraining", "bert", "embedding"),
    ],
)
def test_the_architecture_calls_for_an_engine(architecture: str, model_type: str, engine: str) -> None:
    assert models.engine_of("org/name", config(architecture, model_type), FILES) == engine


@pytest.mark.parametrize(
    "architecture", ["Qwen3ForCausalLM", "MistralModel", "BertForMaskedLM", "T5EncoderModel"]
)
def test_what_has_modules_embeds(architecture: str) -> None:
    assert models.engine_of("org/name", config(architecture), FILES | {"modules.json"}) == "embedding"


def test_modules_make_up_for_a_missing_architecture() -> None:
    given = {"model_type": "bert"}

    assert models.engine_of("org/name", given, FILES | {"modules.json"}) == "embedding"


def test_the_engine_asked_for_is_taken_where_it_can_run_the_model() -> None:
    assert models.engine_of("org/name", config("LlamaModel", "llama"), FILES, "embedding") == "embedding"
    sentences = FILES | {"modules.json"}
    assert models.engine_of("org/name", config("Qwen3ForCausalLM"), sentences, "causal_lm") == "causal_lm"
    assert "ends in ForCausalLM" in refusal(config("BertModel", "bert"), asked="causal_lm")


def test_another_engine_knows_itself_what_it_runs() -> None:
    quantised = config("WhateverForCausalLM", quantization_config={"quant_method": "gptq"})

    assert models.engine_of("org/name", quantised, FILES, "other") == "other"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (config("T5ForConditionalGeneration", "t5"), "encoder for its input"),
        (config("BertForSequenceClassification", "bert"), "rerankers"),
        (config("ViTForImageClassification", "vit"), "pictures"),
        (config("GPT2Model", "gpt2"), "no modules.json says how"),
        (config("CLIPModel", "clip"), "no modules.json says how"),
        (config("SomethingNew", "new"), "no engine runs SomethingNew"),
        ({}, "names no architectures"),
        ({"architectures": None}, "names no architectures"),
        ({"architectures": "LlamaForCausalLM"}, "names no architectures"),
        (config("LlamaForCausalLM", quantization_config={"quant_method": "awq"}), "quantised (awq)"),
        (
            config("LlamaForCausalLM", quantization_config={"quant_method": "fp8"}),
            "from which it was quantised",
        ),
    ],
)
def test_what_no_engine_runs_is_refused_by_name(given: Mapping[str, Any], words: str) -> None:
    assert words in refusal(given)


def test_a_tokenizer_only_for_sentencepiece_is_refused_with_what_to_do() -> None:
    message = refusal(config("LlamaForCausalLM"), frozenset({"model.safetensors", "tokenizer.model"}))

    assert "SentencePiece" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("file", ["tekken.json", "tiktoken.model", "qwen.tiktoken"])
def test_a_tokenizer_only_for_tiktoken_is_refused_with_what_to_do(file: str) -> None:
    message = refusal(config("LlamaForCausalLM"), frozenset({"model.safetensors", file}))

    assert f"tiktoken's format ({file})" in message
    # vLLM brings what reads it
    assert models.has_tokenizer({file}, of_any_format=True)
    assert "save_pretrained" in message


def test_a_cross_encoder_is_refused_though_it_has_modules() -> None:
    files = {"model.safetensors", "tokenizer.json", "modules.json"}

    assert "rerankers" in refusal(config("BertForSequenceClassification"), frozenset(files))
    files.add("1_Pooling/config.json")
    assert models.engine_of("org/name", config("BertForSequenceClassification"), files) == "embedding"


@pytest.mark.parametrize("file", ["vocab.txt", "vocab.json"])
def test_other_tokenizers_are_made_from_their_vocabularies(file: str) -> None:
    files = frozenset({"model.safetensors", "tokenizer.model", "merges.txt", file})

    assert models.engine_of("org/name", config("LlamaForCausalLM"), files) == "causal_lm"


# Weights


def index(*files: str) -> dict[str, Any]:
    return {"weight_map": {f"weight{number}": file for number, file in enumerate(files)}}


def test_a_single_file_goes_before_an_index() -> None:
    files = {"model.safetensors", "model.safetensors.index.json", "old.safetensors"}

    assert models.weight_files("org/name", files, lambda: index("old.safetensors")) == ["model.safetensors"]


def test_an_index_names_the_files() -> None:
    found = models.weight_files("org/name", {models.INDEX}, lambda: index("b.safetensors", "a.safetensors"))

    assert found == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "content", [None, [], {}, {"weight_map": {}}, index("../a"), index("/a"), index("..")]
)
def test_an_index_that_is_none_is_not_taken(content: object) -> None:
    with pytest.raises(ValueError, match=r"weight_map|outside"):
        models.weight_files("org/name", {models.INDEX}, lambda: content)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"llama.Q4.gguf"}, ["GGUF", "llama.Q4.gguf", "repository from which"]),
        ({"pytorch_model.bin", "training_args.bin"}, ["pickled", "pytorch_model.bin", "save_pretrained"]),
        ({"pytorch_model-00001-of-00002.bin"}, ["pickled"]),
        ({"original/consolidated.00.pth"}, ["pickled"]),
        ({"tf_model.h5"}, ["TensorFlow", "from_tf=True"]),
        ({"flax_model.msgpack"}, ["Flax", "from_flax=True"]),
        ({"onnx/model.onnx"}, ["ONNX"]),
        ({"adapter_config.json", "adapter_model.safetensors"}, ["adapter", "merge_and_unload"]),
        ({"consolidated.safetensors"}, ["consolidated.safetensors", "transformers' format"]),
    ],
)
def test_another_format_is_named_with_what_to_do(files: set[str], words: list[str]) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        models.weight_files("org/name", files | {"config.json"}, dict)

    assert refused.value.reason == "MODEL_UNSUPPORTED"
    for word in words:
        assert word in refused.value.message


def test_weights_that_are_simply_missing_are_named_by_whoever_looks_for_them() -> None:
    assert models.weight_files("org/name", {"config.json", "training_args.bin"}, dict) == [
        "model.safetensors"
    ]

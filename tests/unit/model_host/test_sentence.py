"""Embeddings follow the whole chain of modules that sentence-transformers wrote, or the model is refused.

The right vectors are computed here one text at a time, without padding, by the plainest code there is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from dumont.errors import FailedPrecondition, InvalidArgument
from model_host import model_files
from model_host.engine import Phases, Settings
from model_host.engines import choice, embedding
from model_host.engines.embedding import Embedding
from tests.unit.model_host.test_embedding import run_all, vectors
from tests.unit.model_host.tiny_models import VOCABULARY, save, words

HIDDEN = 32
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
TEXTS = [[5], [9, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [60, 9], [7] * 6]

MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.max(0).values,
    "mean": lambda states: states.sum(0) / len(states),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / math.sqrt(len(states)),
    "weightedmean": lambda states: (
        sum((place * state for place, state in enumerate(states, 1)), torch.zeros(HIDDEN))
        / sum(range(1, len(states) + 1))
    ),
}


class Maker:
    """Writes a sentence embedding model as sentence-transformers does, and computes what it would say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[dict[str, Any]] = []
        self.model: Any = None
        self.pool: Callable[[Tensor], Tensor] = lambda states: states
        self.after: list[nn.Module] = []
        self.prompt: list[int] = []

    def write(self, name: str, content: object) -> None:
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))

    def module(self, kind: str, config: object = None, tensors: dict[str, Tensor] | None = None) -> Maker:
        number = len(self.modules)
        path = "" if number == 0 else f"{number}_{kind.rpartition('.')[2]}"
        kind = kind if "." in kind else f"sentence_transformers.models.{kind}"
        self.modules.append({"idx": number, "name": str(number), "path": path, "type": kind})
        if config is not None:
            self.write(f"{path}/config.json", config)
        if tensors is not None:
            (self.folder / path).mkdir(exist_ok=True)
            save_file(tensors, self.folder / path / "model.safetensors")
        self.write("modules.json", self.modules)
        return self

    def transformer(self, config: Any = None, kind: Any = transformers.BertModel) -> Maker:
        torch.manual_seed(3)
        config = config or transformers.BertConfig(**COMMON, max_position_embeddings=40)
        self.model = kind(config).eval()
        save(self.model, self.folder)
        return self.module("Transformer")

    def pooling(self, *modes: str) -> Maker:
        self.pool = lambda states: torch.cat([MODES[mode](states) for mode in modes])
        mode = modes[0] if len(modes) == 1 else modes
        return self.module("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": mode})

    def dense(self, size: int, name: str | None, activation: nn.Module, *, residual: bool = False) -> Maker:
        torch.manual_seed(size)
        linear = nn.Linear(HIDDEN, size)
        tensors = {"linear.weight": linear.weight, "linear.bias": linear.bias}
        extra = nn.Linear(HIDDEN, size, bias=False)
        if residual:
            tensors["residual.weight"] = extra.weight
        config: dict[str, object] = {
            "in_features": HIDDEN,
            "out_features": size,
            "bias": True,
            "use_residual": residual,
        }
        if name is not None:
            config["activation_function"] = name
        self.module("Dense", config, {key: value.detach() for key, value in tensors.items()})

        class Right(nn.Module):
            def forward(self, vector: Tensor) -> Tensor:
                found: Tensor = activation(linear(vector))
                return found + extra(vector) if residual else found

        self.after.append(Right())
        return self

    def normalize(self) -> Maker:
        class Right(nn.Module):
            def forward(self, vector: Tensor) -> Tensor:
                return vector / vector.norm()

        self.after.append(Right())
        return self.module("Normalize")

    @torch.inference_mode()
    def right(self, tokens: list[int], *, skipped: int = 0) -> list[float]:
        model = getattr(self.model, self.model.base_model_prefix, self.model)
        model = getattr(model, "encoder", model) if model.config.is_encoder_decoder else model
        states = model(torch.tensor([[*self.prompt, *tokens]])).last_hidden_state[0].float()
        vector = self.pool(states[skipped:])
        for module in self.after:
            vector = module(vector)
        values: list[float] = vector.tolist()
        return values

    def load(self) -> Embedding:
        return load(self.folder)


def load(folder: Path) -> Embedding:
    files = model_files.read(folder)
    assert choice.choose("", files) == "embedding"
    return embedding.load(files, Settings(device="cpu", threads=1), Phases())


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def said(engine: Embedding, texts: list[list[int]] = TEXTS) -> list[list[float]]:
    """Vectors of texts that are computed together."""
    work = engine.embed([words(text) for text in texts])
    return vectors(work, run_all(engine, [work])[work])


def assert_right(maker: Maker, texts: list[list[int]] = TEXTS, skipped: int = 0) -> None:
    found = torch.tensor(said(maker.load(), texts))
    expected = torch.tensor([maker.right(text, skipped=skipped) for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", list(MODES))
def test_each_mode_of_pooling(maker: Maker, mode: str) -> None:
    assert_right(maker.transformer().pooling(mode))


@pytest.mark.parametrize(
    ("former", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ["cls"]),
        ({"pooling_mode_lasttoken": True}, ["lasttoken"]),
        ({"pooling_mode_max_tokens": True}, ["max"]),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ["mean_sqrt_len_tokens"]),
        ({"pooling_mode_weightedmean_tokens": True}, ["weightedmean"]),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ["cls", "mean"]),
        (
            {
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": True,
                "pooling_mode_lasttoken": True,
            },
            ["max", "mean", "lasttoken"],
        ),
        ({"word_embedding_dimension": HIDDEN}, ["mean"]),
    ],
)
def test_each_mode_as_it_was_written_formerly(
    maker: Maker, former: dict[str, object], modes: list[str]
) -> None:
    maker.transformer().pooling(*modes)
    maker.write("1_Pooling/config.json", former)

    assert_right(maker)


def test_several_modes_are_joined_in_their_order(maker: Maker) -> None:
    maker.transformer().pooling("mean", "cls", "max")

    assert_right(maker)
    assert len(said(maker.load())[0]) == 3 * HIDDEN


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("torch.nn.modules.activation.Tanh", nn.Tanh()),
        ("torch.nn.modules.linear.Identity", nn.Identity()),
        ("torch.nn.modules.activation.GELU", nn.GELU()),
        (None, nn.Tanh()),
    ],
)
def test_a_dense_layer_and_its_activation(maker: Maker, name: str | None, activation: nn.Module) -> None:
    maker.transformer().pooling("mean").dense(8, name, activation)

    assert_right(maker)
    assert len(said(maker.load())[0]) == 8


def test_a_dense_layer_may_add_its_input(maker: Maker) -> None:
    identity = "torch.nn.modules.linear.Identity"

    assert_right(maker.transformer().pooling("mean").dense(8, identity, nn.Identity(), residual=True))


def test_the_whole_chain(maker: Maker) -> None:
    maker.transformer().pooling("cls").dense(16, None, nn.Tanh()).normalize()

    assert_right(maker)
    assert math.hypot(*said(maker.load())[0]) == pytest.approx(1, abs=1e-5)


def test_a_layer_norm(maker: Maker) -> None:
    torch.manual_seed(1)
    norm = nn.LayerNorm(HIDDEN)
    nn.init.normal_(norm.weight)
    maker.transformer().pooling("mean")
    maker.module("LayerNorm", {"dimension": HIDDEN}, {f"norm.{k}": v for k, v in norm.state_dict().items()})
    maker.after.append(norm)

    assert_right(maker)


def test_dropout_does_nothing(maker: Maker) -> None:
    assert_right(maker.transformer().pooling("mean").module("Dropout", {"dropout": 0.5}))


# Models


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (transformers.BertConfig(**COMMON), transformers.BertForMaskedLM),
        (
            transformers.RobertaConfig(**COMMON, max_position_embeddings=40, pad_token_id=1),
            transformers.RobertaForMaskedLM,
        ),
        (transformers.MPNetConfig(**COMMON), transformers.MPNetForMaskedLM),
        (
            transformers.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8),
            transformers.Qwen3ForCausalLM,
        ),
        (
            transformers.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=4),
            transformers.MistralModel,
        ),
        (
            transformers.T5Config(
                vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                initializer_factor=1.0,
            ),
            transformers.T5ForConditionalGeneration,
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_heads_are_left_out(maker: Maker, config: Any, kind: Any) -> None:
    assert_right(maker.transformer(config, kind).pooling("lasttoken", "mean"))


def test_an_encoder_without_modules_has_the_mean(maker: Maker) -> None:
    maker.transformer(None, transformers.BertForMaskedLM).pooling("mean")
    (maker.folder / "modules.json").unlink()

    assert_right(maker)


def test_a_model_for_which_padding_is_not_nothing_is_computed_text_by_text(maker: Maker) -> None:
    # given a model that mixes all tokens, the padding, too
    config = transformers.FNetConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, intermediate_size=64,
        initializer_range=0.5, max_position_embeddings=40,
    )  # fmt: skip

    assert_right(maker.transformer(config, Unmasked).pooling("mean"))
    assert not maker.load()._pads


class Unmasked(transformers.FNetModel):
    """FNet takes no attention mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        return super().forward(input_ids, **options)


# Texts


def test_the_default_prompt_comes_before_each_text(maker: Maker) -> None:
    maker.transformer().pooling("mean")
    maker.write(
        "config_sentence_transformers.json",
        {"prompts": {"query": "w50 w51 ", "document": "w9 "}, "default_prompt_name": "query"},
    )
    maker.prompt = [50, 51]

    assert_right(maker)


def test_the_tokens_of_a_prompt_may_be_left_out_of_pooling(maker: Maker) -> None:
    maker.transformer().pooling("mean", "cls", "weightedmean")
    maker.write("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"], "include_prompt": False})
    maker.pool = lambda states: torch.cat([MODES["mean"](states), MODES["cls"](states)])
    maker.write(
        "config_sentence_transformers.json",
        {"prompts": {"query": "w50 w51 "}, "default_prompt_name": "query"},
    )
    maker.prompt = [50, 51]
    # and a tokenizer that puts a special token at both ends
    tokenizer = Tokenizer.from_file(str(maker.folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["w62", "w63"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="w62 $A w63", special_tokens=[("w62", 62), ("w63", 63)]
    )
    tokenizer.save(str(maker.folder / "tokenizer.json"))

    found = torch.tensor(said(maker.load(), TEXTS))

    maker.prompt = [62, 50, 51]
    expected = torch.tensor([maker.right([*text, 63], skipped=3) for text in TEXTS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_prompts_of_which_none_is_the_default_change_nothing(maker: Maker) -> None:
    maker.transformer().pooling("mean")
    maker.write("config_sentence_transformers.json", {"prompts": {"query": "w50 "}})

    assert_right(maker)


def test_vectors_may_be_cut_after_all_else(maker: Maker) -> None:
    maker.transformer().pooling("mean").normalize()
    maker.write("config_sentence_transformers.json", {"truncate_dim": 8})

    expected = torch.tensor([maker.right(text)[:8] for text in TEXTS])
    torch.testing.assert_close(torch.tensor(said(maker.load())), expected, rtol=1e-4, atol=1e-5)


def test_arguments_that_change_no_vector_are_passed_over(maker: Maker) -> None:
    maker.transformer().pooling("mean")
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    settings = {"modality_config": {"text": text}, "model_args": {"attn_implementation": "eager"}}
    maker.write("sentence_bert_config.json", settings)

    assert_right(maker)


def test_a_text_may_have_as_many_tokens_as_the_model_was_made_for(maker: Maker) -> None:
    maker.transformer().pooling("mean")
    maker.write("sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False})
    engine = maker.load()

    assert engine.context_length == 12
    with pytest.raises(InvalidArgument) as refused:
        engine.embed(["w1 " * 13])
    assert refused.value.reason == "PROMPT_TOO_LONG"


def test_the_positions_of_roberta_begin_after_that_of_its_padding(maker: Maker) -> None:
    config = transformers.RobertaConfig(**COMMON, max_position_embeddings=42, pad_token_id=1)
    maker.transformer(config, transformers.RobertaModel).pooling("mean")

    assert maker.load().context_length == 40
    assert_right(maker, [[5] * 40, [5]])


def test_texts_may_be_put_in_lower_case(maker: Maker) -> None:
    maker.transformer().pooling("mean")
    maker.write("sentence_bert_config.json", {"do_lower_case": True})
    engine = maker.load()

    work = engine.embed(["W5 W6"])

    assert vectors(work, run_all(engine, [work])[work]) == said(engine, [[5, 6]])


# Refusals


def refusal(folder: Path) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as refused:
        load(folder)
    assert refused.value.field == "model"
    return refused.value


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("WeightedLayerPooling", "WeightedLayerPooling"),
        ("CNN", "CNN"),
        ("sentence_transformers.sparse_encoder.models.SpladePooling", "SpladePooling"),
        ("custom_st.Transformer", "custom_st.Transformer"),
    ],
)
def test_a_module_that_is_not_followed_is_refused_by_name(maker: Maker, kind: str, words: str) -> None:
    error = refusal(maker.transformer().pooling("mean").module(kind, {}).folder)

    assert error.reason == "MODEL_UNSUPPORTED"
    assert words in error.message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "attention"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "fill-mask"),
        ("sentence_bert_config.json", {"tokenizer_args": {"do_lower_case": True}}, "do_lower_case"),
        ("sentence_bert_config.json", {"config_args": {"num_hidden_layers": 1}}, "num_hidden_layers"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
            "pooler_output",
        ),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
        ("config_sentence_transformers.json", {"default_prompt_name": "gone"}, "gone"),
        ("modules.json", [], "no modules"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": ""}], "Pooling"),
        (
            "modules.json",
            [
                {"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"},
                {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
            ],
            "0_Transformer",
        ),
    ],
)
def test_what_would_give_other_vectors_is_refused_by_name(
    maker: Maker, file: str, content: object, words: str
) -> None:
    maker.transformer().pooling("mean")
    maker.write(file, content)

    error = refusal(maker.folder)

    assert error.reason == "MODEL_UNSUPPORTED"
    assert words in error.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_function": "somebody.else.Activation"}, "somebody.else"),
        ({"activation_function": "torch.nn.functional.tanh"}, "functional.tanh"),
        ({"activation_function": "torch.nn.modules.linear.Linear"}, "Linear"),
        ({"module_input_name": "token_embeddings"}, "token_embeddings"),
    ],
)
def test_a_dense_layer_that_is_not_followed_is_refused(
    maker: Maker, change: dict[str, str], words: str
) -> None:
    maker.transformer().pooling("mean").dense(8, None, nn.Tanh())
    maker.write("2_Dense/config.json", change)

    assert words in refusal(maker.folder).message


def test_a_dense_layer_without_safe_weights_is_refused_with_what_to_do(maker: Maker) -> None:
    maker.transformer().pooling("mean").dense(8, None, nn.Tanh())
    weights = maker.folder / "2_Dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))

    error = refusal(maker.folder)

    assert error.reason == "MODEL_UNSUPPORTED"
    assert "SentenceTransformer(DIRECTORY).save(DIRECTORY)" in error.message


@pytest.mark.parametrize("module", ["1_Pooling", "2_Dense"])
def test_a_module_without_its_configuration_is_not_guessed(maker: Maker, module: str) -> None:
    maker.transformer().pooling("cls").dense(8, None, nn.Tanh())
    file = maker.folder / module / "config.json"
    file.unlink()

    error = refusal(maker.folder)

    assert (error.reason, error.metadata) == ("MODEL_INVALID", {"file": str(file)})


def test_damaged_weights_of_a_module_are_named(maker: Maker) -> None:
    maker.transformer().pooling("mean").dense(8, None, nn.Tanh())
    weights = maker.folder / "2_Dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])

    error = refusal(maker.folder)

    assert (error.reason, error.metadata) == ("MODEL_INVALID", {"file": str(weights)})

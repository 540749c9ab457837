"""What a model's generation_config.json asks for is honoured, or the model is refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from dumont import generation_config
from dumont.errors import FailedPrecondition
from dumont.generation_config import Defaults

# What cannot change which tokens an answer has, or is each request's own.
WITHOUT_EFFECT = frozenset(
    {
        # a request's own
        "max_length", "max_new_tokens", "max_time", "do_sample", "temperature", "num_return_sequences",
        # how it is computed, and what is given back
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config",
        "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size",
        "output_attentions", "output_hidden_states", "output_scores", "output_logits",
        "return_dict_in_generate", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
        "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
        "speculation_type", "use_mtp", "_from_model_config", "transformers_version",
        # of beams, encoders, and probabilities that are no numbers, which fail here
        "early_stopping", "length_penalty", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
        "remove_invalid_values", "renormalize_logits",
        # tokens of the tokenizer's
        "pad_token_id", "bos_token_id", "decoder_start_token_id",
    }
)  # fmt: skip
HONOURED = frozenset(
    {*generation_config.REQUEST_FIELDS, "eos_token_id", "suppress_tokens", "bad_words_ids", "min_length",
     "min_new_tokens", "stop_strings"}
)  # fmt: skip


def read(config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None) -> Defaults:
    return generation_config.read("org/name", config or {}, generation)


def refusal(generation: dict[str, Any]) -> str:
    with pytest.raises(FailedPrecondition) as refused:
        read({}, generation)
    assert (refused.value.reason, refused.value.field) == ("MODEL_UNSUPPORTED", "model")
    return refused.value.message


def test_every_setting_of_transformers_is_honoured_or_refused_or_without_effect() -> None:
    known = HONOURED | WITHOUT_EFFECT | generation_config.NOT_COMPUTED.keys()

    assert known == GenerationConfig().to_dict().keys()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("no_repeat_ngram_size", 3),
        # Of a decoder, the prompt is what these call the encoder's.
        ("encoder_no_repeat_ngram_size", 3),
        ("encoder_repetition_penalty", 2.0),
        ("begin_suppress_tokens", [1]),
        ("forced_bos_token_id", 2),
        ("forced_eos_token_id", 2),
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("guidance_scale", 1.5),
        ("exponential_decay_length_penalty", [5, 1.1]),
        ("sequence_bias", [[[1, 2], -5.0]]),
        ("watermarking_config", {"bias": 2.0}),
        ("repetition_penalty", 0),
        ("repetition_penalty", "high"),
        ("top_p", 1.5),
        ("min_p", -1),
    ],
)
def test_what_is_not_computed_is_refused_by_name(setting: str, value: object) -> None:
    message = refusal({setting: value})

    assert setting in message
    assert "generation_config.json" in message


def test_words_of_several_tokens_and_too_many_tokens_are_refused() -> None:
    assert "several tokens" in refusal({"bad_words_ids": [[1], [2, 3]]})
    assert "bans 2000 tokens" in refusal({"suppress_tokens": list(range(2000))})
    assert "makes no sense" in refusal({"suppress_tokens": ["a"]})


@pytest.mark.parametrize("setting", generation_config.NOT_COMPUTED)
def test_what_has_no_effect_is_no_reason_to_refuse(setting: str) -> None:
    for value in generation_config.NOT_COMPUTED[setting]:
        assert read({}, {setting: value}) == Defaults()


def test_what_is_honoured() -> None:
    defaults = read(
        {},
        {
            "top_k": 20, "top_p": 0.9, "min_p": None, "repetition_penalty": 1.1, "temperature": 0.6,
            "suppress_tokens": [5, 7], "bad_words_ids": [[9], [2]], "eos_token_id": [2, 3], "min_length": 8,
            "min_new_tokens": 2, "stop_strings": "###",
        },
    )  # fmt: skip

    assert defaults.fields == {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    assert defaults.banned == {5, 7, 9}
    assert defaults.stop == ("###",)
    assert [defaults.least(prompt) for prompt in (3, 7, 100)] == [5, 2, 2]


def test_older_models_have_such_settings_in_their_configuration() -> None:
    config = {"repetition_penalty": 1.3, "vocab_size": 9}

    assert read(config).fields == {"repetition_penalty": 1.3}
    # As in transformers, it is not looked at beside the newer file.
    assert read(config, {}).fields == {}

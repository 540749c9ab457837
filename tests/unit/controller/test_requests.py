"""What a caller may ask of a model."""

from __future__ import annotations

import math

import pytest

from controller.requests import check_embed, check_generate
from dumont.controller.v1 import inference_service_pb2 as pb
from dumont.errors import InvalidArgument
from dumont.inference.v1 import inference_pb2

LIMIT = 4096


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({}, "EMPTY_PROMPT", "prompt"),
        (
            {"prompt": "a", "messages": [inference_pb2.ChatMessage(role="user", content="b")]},
            "PROMPT_AND_MESSAGES",
            "prompt",
        ),
        ({"messages": [inference_pb2.ChatMessage(content="b")]}, "EMPTY_ROLE", "messages[0].role"),
        ({"prompt": "a", "max_new_tokens": LIMIT + 1}, "TOO_MANY_TOKENS", "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": -1}, "NEGATIVE_TOKENS", "max_new_tokens"),
        ({"prompt": "a", "temperature": 2.1}, "INVALID_TEMPERATURE", "temperature"),
        ({"prompt": "a", "temperature": -0.1}, "INVALID_TEMPERATURE", "temperature"),
        ({"prompt": "a", "temperature": math.nan}, "INVALID_TEMPERATURE", "temperature"),
        ({"prompt": "a", "temperature": math.inf}, "INVALID_TEMPERATURE", "temperature"),
        ({"prompt": "a", "top_p": 0.0}, "INVALID_TOP_P", "top_p"),
        ({"prompt": "a", "top_p": 1.1}, "INVALID_TOP_P", "top_p"),
        ({"prompt": "a", "top_p": math.nan}, "INVALID_TOP_P", "top_p"),
        ({"prompt": "a", "top_k": -1}, "INVALID_TOP_K", "top_k"),
        ({"prompt": "a", "min_p": 1.5}, "INVALID_MIN_P", "min_p"),
        ({"prompt": "a", "repetition_penalty": 0.0}, "INVALID_REPETITION_PENALTY", "repetition_penalty"),
        ({"prompt": "a", "presence_penalty": 2.5}, "INVALID_PRESENCE_PENALTY", "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": -2.5}, "INVALID_FREQUENCY_PENALTY", "frequency_penalty"),
        ({"prompt": "a", "logprobs": 21}, "INVALID_LOGPROBS", "logprobs"),
        ({"prompt": "a", "n": 17}, "INVALID_N", "n"),
        ({"prompt": "a", "n": -1}, "INVALID_N", "n"),
        ({"prompt": "a", "logit_bias": {3: math.nan}}, "INVALID_LOGIT_BIAS", "logit_bias[3]"),
        ({"prompt": "a", "logit_bias": {-3: 1.0}}, "INVALID_TOKEN_ID", "logit_bias"),
        ({"prompt": "a", "logit_bias": dict.fromkeys(range(1025), 1.0)}, "TOO_MANY_BIASES", "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [5, -5]}, "INVALID_TOKEN_ID", "stop_token_ids[1]"),
        ({"prompt": "a", "stop_token_ids": [5] * 65}, "TOO_MANY_STOPS", "stop_token_ids"),
        ({"prompt": "a", "min_new_tokens": -1}, "INVALID_MIN_NEW_TOKENS", "min_new_tokens"),
        (
            {"prompt": "a", "max_new_tokens": 4, "min_new_tokens": 5},
            "INVALID_MIN_NEW_TOKENS",
            "min_new_tokens",
        ),
        ({"prompt": "a", "stop": ["x"] * 17}, "TOO_MANY_STOPS", "stop"),
        ({"prompt": "a", "stop": ["x", ""]}, "INVALID_STOP", "stop[1]"),
        ({"prompt": "a", "stop": ["x" * 300]}, "INVALID_STOP", "stop[0]"),
    ],
)
def test_a_bad_generate_is_refused_by_field(fields: dict[str, object], reason: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        check_generate(pb.GenerateRequest(deployment="deployments/qa", **fields), LIMIT)
    assert (failure.value.reason, failure.value.field) == (reason, field)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a"},
        {"prompt": "a", "max_new_tokens": LIMIT, "temperature": 2.0, "top_p": 1.0, "stop": ["x"] * 16},
        {"messages": [inference_pb2.ChatMessage(role="user", content="")]},
        {
            "prompt": "a",
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": -2.0,
            "frequency_penalty": 2.0,
            "logit_bias": {0: -100.0},
            "stop_token_ids": [0],
            "ignore_eos": True,
            "min_new_tokens": 256,
            "logprobs": 0,
            "n": 16,
        },
    ],
)
def test_a_good_generate_passes(fields: dict[str, object]) -> None:
    assert check_generate(pb.GenerateRequest(deployment="deployments/qa", **fields), LIMIT) is None


@pytest.mark.parametrize(
    ("inputs", "reason", "field"),
    [
        ([], "EMPTY_INPUTS", "inputs"),
        (["a", ""], "EMPTY_INPUT", "inputs[1]"),
        (["a"] * 3000, "TOO_MANY_INPUTS", "inputs"),
    ],
)
def test_a_bad_embed_is_refused_by_field(inputs: list[str], reason: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        check_embed(pb.EmbedRequest(deployment="deployments/qa", inputs=inputs))
    assert (failure.value.reason, failure.value.field) == (reason, field)

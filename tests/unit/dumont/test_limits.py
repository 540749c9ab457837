"""What a caller may ask of a model, told alike by the client, the controller and the model host."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dumont import limits
from dumont.controller.v1 import inference_service_pb2 as pb
from dumont.errors import InvalidArgument
from dumont.inference.v1 import inference_pb2
from dumont.limits import check_embed, check_generate

LIMIT = 4096


def set_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a request carries once it has crossed the wire."""
    sent = pb.GenerateRequest(deployment="deployments/qa", **fields).SerializeToString()
    return {field.name: value for field, value in pb.GenerateRequest.FromString(sent).ListFields()}


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
        (
            {"messages": [inference_pb2.ChatMessage(role=role, content="b") for role in ("user", "admin")]},
            "INVALID_ROLE",
            "messages[1].role",
        ),
        ({"prompt": "a", "max_new_tokens": LIMIT + 1}, "INVALID_MAX_NEW_TOKENS", "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": -1}, "INVALID_MAX_NEW_TOKENS", "max_new_tokens"),
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
def test_a_bad_generate_is_refused_by_field(fields: dict[str, Any], reason: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        check_generate(set_fields(fields), LIMIT)
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
def test_a_good_generate_passes(fields: dict[str, Any]) -> None:
    check_generate(set_fields(fields), LIMIT)


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
        check_embed(inputs)
    assert (failure.value.reason, failure.value.field) == (reason, field)


def test_one_fault_has_one_reason_whoever_finds_it() -> None:
    # given: a temperature that the client, the wire and the model host each hold in their own way
    given = {"prompt": "Hi", "temperature": 2.5}
    for fields in (given, set_fields(given), {**given, "top_p": None, "stop": (), "messages": ()}):
        with pytest.raises(InvalidArgument) as failure:
            check_generate(fields)
        assert (failure.value.reason, failure.value.field) == ("INVALID_TEMPERATURE", "temperature")


def test_every_field_with_a_range_is_a_field_of_the_request() -> None:
    known = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields}
    named = {allowed.field for allowed in limits.RANGES} | {count.field for count in limits.COUNTS}
    assert named <= known

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

"""What is plainly wrong is refused before any call, with the field named."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dumont import arguments
from dumont.controller.v1.deployment_service_pb2 import (
    START_MODE_CHECKPOINT,
    START_MODE_COLD,
    START_MODE_WARM,
    STORAGE_S3,
    WEIGHTS_INCLUDED,
)
from dumont.errors import InvalidArgument
from dumont.names import LABEL


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3-0-6b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("/models/My Model/", "my-model"),
        ("org/4bit_llama", "m-4bit-llama"),
        ("org/--x--", "x"),
        ("org/" + "a" * 62 + "-b", "a" * 62),
    ],
)
def test_a_deployment_is_named_after_its_model(model: str, expected: str) -> None:
    assert arguments.deployment_id(model) == expected


@given(st.text(), st.sampled_from("aZ09"), st.text())
def test_a_name_made_of_a_model_is_always_a_label(before: str, letter: str, after: str) -> None:
    made = arguments.deployment_id(f"{before}{letter}{after}".replace("/", "."))
    assert LABEL.fullmatch(made)


@pytest.mark.parametrize("model", ["", "/", "org/--", "org/模型"])
def test_a_model_without_a_letter_or_digit_needs_a_name(model: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        arguments.deployment_id(model)
    assert (raised.value.reason, raised.value.field) == ("NAME_REQUIRED", "name")


def test_what_is_left_out_is_left_to_the_controller() -> None:
    message, paths = arguments.deployment_message("org/model", None, None)
    assert (message.start_mode, paths) == (START_MODE_CHECKPOINT, [])
    message, paths = arguments.deployment_message("org/model", "checkpoint", {"storage": "s3"})
    assert message.checkpoint.enabled
    assert not message.checkpoint.HasField("ttl")
    assert paths == ["start_mode", "checkpoint.storage"]
    message, paths = arguments.deployment_message("org/model", "cold", None)
    assert message.start_mode == START_MODE_COLD
    assert not message.HasField("checkpoint")
    assert paths == ["start_mode"]


def test_what_is_given_is_set() -> None:
    message, paths = arguments.deployment_message(
        "org/model",
        "warm",
        {"ttl": timedelta(minutes=1), "storage": "s3", "weights": "included"},
        engine="embedding",
        park_timeout=0.5,
    )
    assert (message.start_mode, message.engine) == (START_MODE_WARM, "embedding")
    assert (message.checkpoint.ttl.seconds, message.checkpoint.storage) == (60, STORAGE_S3)
    assert message.checkpoint.weights == WEIGHTS_INCLUDED
    assert message.park_timeout.nanos == 500_000_000
    assert paths == [
        "start_mode", "checkpoint.ttl", "checkpoint.storage", "checkpoint.weights", "park_timeout",
    ]  # fmt: skip


def test_a_relative_path_is_made_whole_and_an_id_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    models = [
        arguments.deployment_message(model, "cold", None)[0].model
        for model in ("~/models/x", "/srv/../srv/y", "org/z")
    ]
    assert models == ["/home/somebody/models/x", "/srv/../srv/y", "org/z"]
    assert arguments.deployment_message("./w", "cold", None)[0].model.startswith("/")


@pytest.mark.parametrize(
    ("changed", "reason", "field"),
    [
        ({"model": ""}, "EMPTY", "model"),
        ({"model": None}, "EMPTY", "model"),
        ({"start_mode": "hot"}, "UNKNOWN_CHOICE", "start_mode"),
        ({"start_mode": "unspecified"}, "UNKNOWN_CHOICE", "start_mode"),
        ({"start_mode": ["warm"]}, "UNKNOWN_CHOICE", "start_mode"),
        ({"engine": 5}, "WRONG_TYPE", "engine"),
        ({"checkpoint": True}, "WRONG_TYPE", "checkpoint"),
        ({"checkpoint": {"tll": 5}}, "UNKNOWN_SETTING", "checkpoint.tll"),
        ({"checkpoint": {"ttl": -1}}, "INVALID_DURATION", "checkpoint.ttl"),
        ({"checkpoint": {"ttl": "1h"}}, "INVALID_DURATION", "checkpoint.ttl"),
        ({"checkpoint": {"ttl": True}}, "INVALID_DURATION", "checkpoint.ttl"),
        ({"checkpoint": {"ttl": math.nan}}, "INVALID_DURATION", "checkpoint.ttl"),
        ({"checkpoint": {"ttl": math.inf}}, "INVALID_DURATION", "checkpoint.ttl"),
        ({"checkpoint": {"storage": "tape"}}, "UNKNOWN_CHOICE", "checkpoint.storage"),
        ({"checkpoint": {"weights": "half"}}, "UNKNOWN_CHOICE", "checkpoint.weights"),
        ({"checkpoint": {"enabled": "yes"}}, "NOT_A_BOOLEAN", "checkpoint.enabled"),
        ({"checkpoint": {"enabled": False}}, "CHECKPOINT_DISABLED", "checkpoint.enabled"),
        ({"idle_timeout": -1}, "INVALID_DURATION", "idle_timeout"),
        ({"park_timeout": timedelta(seconds=-1)}, "INVALID_DURATION", "park_timeout"),
        ({"park_timeout": 1e300}, "INVALID_DURATION", "park_timeout"),
    ],
)
def test_a_wrong_setting_names_its_field(changed: dict[str, Any], reason: str, field: str) -> None:
    given: dict[str, Any] = {"model": "org/model", "start_mode": "checkpoint", "checkpoint": None, **changed}
    with pytest.raises(InvalidArgument) as raised:
        arguments.deployment_message(**given)
    assert (raised.value.reason, raised.value.field) == (reason, field)


def test_a_request_carries_only_what_was_given() -> None:
    request = arguments.generate_request("deployments/qa", "Hi")
    assert request.prompt == "Hi"
    assert not request.HasField("temperature")
    assert not request.HasField("seed")
    request = arguments.generate_request("deployments/qa", "Hi", temperature=0, seed=0, stop=["a", "b"])
    assert request.HasField("temperature")
    assert request.HasField("seed")
    assert list(request.stop) == ["a", "b"]
    assert not request.HasField("top_k")


def test_every_option_is_carried() -> None:
    options: dict[str, Any] = {
        "top_k": 0,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {7: -100.0},
        "stop_token_ids": [3],
        "ignore_eos": True,
        "min_new_tokens": 2,
        "logprobs": 0,
        "n": 2,
    }
    request = arguments.generate_request("deployments/qa", "Hi", **options, timeout=5.0)

    carried = {field.name: value for field, value in request.ListFields()}
    assert {name: carried[name] for name in options} == options


@pytest.mark.parametrize(
    ("given", "reason", "field"),
    [
        ({}, "EMPTY_PROMPT", "prompt"),
        ({"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}, "PROMPT_AND_MESSAGES", "prompt"),
        ({"prompt": ""}, "EMPTY_PROMPT", "prompt"),
        ({"prompt": 5}, "WRONG_TYPE", "prompt"),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, "WRONG_TYPE", "prompt"),
        ({"messages": "Hi"}, "WRONG_TYPE", "messages"),
        ({"messages": ["Hi"]}, "INVALID_MESSAGE", "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            "WRONG_TYPE",
            "messages[0].content",
        ),
        ({"messages": [{"role": 5, "content": "Hi"}]}, "WRONG_TYPE", "messages[0].role"),
        ({"prompt": "Hi", "timeout": "5s"}, "INVALID_DURATION", "timeout"),
        ({"prompt": "Hi", "max_tokens": 5}, "UNKNOWN_OPTION", "max_tokens"),
        ({"prompt": "Hi", "stream": True}, "UNKNOWN_OPTION", "stream"),
        ({"prompt": "Hi", "temprature": 1}, "UNKNOWN_OPTION", "temprature"),
        ({"prompt": "Hi", "max_new_tokens": 2.5}, "WRONG_TYPE", "max_new_tokens"),
        ({"prompt": "Hi", "max_new_tokens": True}, "WRONG_TYPE", "max_new_tokens"),
        ({"prompt": "Hi", "ignore_eos": 1}, "WRONG_TYPE", "ignore_eos"),
        ({"prompt": "Hi", "stop": 5}, "WRONG_TYPE", "stop"),
        ({"prompt": "Hi", "stop_token_ids": ["a"]}, "WRONG_TYPE", "stop_token_ids[0]"),
        ({"prompt": "Hi", "logit_bias": [1]}, "WRONG_TYPE", "logit_bias"),
        ({"prompt": "Hi", "logit_bias": {"7": 1.0}}, "WRONG_TYPE", "a key of logit_bias"),
        ({"prompt": "\ud800"}, "UNSENDABLE", None),
        ({"messages": []}, "EMPTY_PROMPT", "prompt"),
        ({"messages": [{"role": "user"}]}, "INVALID_MESSAGE", "messages[0]"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "INVALID_MESSAGE", "messages[0]"),
        ({"prompt": "Hi", "max_new_tokens": 0}, "INVALID_MAX_NEW_TOKENS", "max_new_tokens"),
        ({"prompt": "Hi", "temperature": 3}, "INVALID_TEMPERATURE", "temperature"),
        ({"prompt": "Hi", "max_new_tokens": 2**31}, "INVALID_MAX_NEW_TOKENS", "max_new_tokens"),
        ({"prompt": "Hi", "temperature": "hot"}, "WRONG_TYPE", "temperature"),
        ({"prompt": "Hi", "stop": [1]}, "WRONG_TYPE", "stop[0]"),
    ],
)
def test_a_wrong_request_is_refused(given: dict[str, Any], reason: str, field: str | None) -> None:
    with pytest.raises(InvalidArgument) as raised:
        arguments.generate_request("deployments/qa", **given)
    assert (raised.value.reason, raised.value.field) == (reason, field)


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("max_tokens", "max_new_tokens"),
        ("stream", "stream()"),
        ("temprature", "temperature"),
        ("wholly_unknown", "max_new_tokens"),
    ],
)
def test_an_option_of_another_library_leads_to_ours(option: str, advice: str) -> None:
    options: dict[str, Any] = {option: 1}
    with pytest.raises(InvalidArgument) as raised:
        arguments.generate_request("deployments/qa", "Hi", **options)
    assert advice in raised.value.message


def test_a_conversation_in_place_of_the_prompt_is_told_where_it_belongs() -> None:
    conversation: Any = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InvalidArgument, match="messages="):
        arguments.generate_request("deployments/qa", conversation)


@pytest.mark.parametrize("inputs", [None, 5, b"one", {"a": 1}, [5], [b"one"], [["nested"]]])
def test_what_is_not_text_is_not_embedded(inputs: Any) -> None:
    with pytest.raises(InvalidArgument) as raised:
        arguments.embed_request("deployments/qa", inputs)
    assert raised.value.reason == "WRONG_TYPE"


def test_texts_may_come_from_a_generator() -> None:
    assert list(arguments.embed_request("deployments/qa", iter("ab")).inputs) == ["a", "b"]


def test_one_text_or_several_are_embedded_and_none_is_refused() -> None:
    assert list(arguments.embed_request("deployments/qa", "one").inputs) == ["one"]
    assert list(arguments.embed_request("deployments/qa", ("a", "b")).inputs) == ["a", "b"]
    with pytest.raises(InvalidArgument, match="at least one input"):
        arguments.embed_request("deployments/qa", [])
    with pytest.raises(InvalidArgument) as raised:
        arguments.embed_request("deployments/qa", ["a", ""])
    assert raised.value.field == "inputs[1]"


def test_what_no_node_takes_is_refused_before_it_is_sent() -> None:
    for make in (
        lambda: arguments.generate_request("deployments/qa", "x" * 4 * 1024 * 1024),
        lambda: arguments.embed_request("deployments/qa", ["x" * 1024] * 2048 * 2),
        lambda: arguments.embed_request("deployments/qa", ["x" * 4096] * 1024),
    ):
        with pytest.raises(InvalidArgument) as refused:
            make()
        assert refused.value.reason in ("REQUEST_TOO_LARGE", "TOO_MANY_INPUTS")
        assert refused.value.metadata


def test_names_are_taken_with_or_without_their_collection() -> None:
    assert arguments.full_name("qa", "deployments", "name") == "deployments/qa"
    assert arguments.full_name("deployments/qa", "deployments", "name") == "deployments/qa"
    for wrong in ("instances/qa", "deployments/", "", "QA", "a/b/c"):
        with pytest.raises(InvalidArgument) as raised:
            arguments.full_name(wrong, "deployments", "name")
        assert raised.value.field == "name"

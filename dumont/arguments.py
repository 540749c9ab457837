"""Turns the arguments of client calls into requests, and refuses what is plainly wrong before any call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

from dumont import limits, names
from dumont.controller.v1 import deployment_service_pb2, inference_service_pb2
from dumont.convert import duration
from dumont.errors import InvalidArgument
from dumont.inference.v1 import inference_pb2

Seconds = float | timedelta

LONGEST_SECONDS: Final = 315_576_000_000  # what google.protobuf.Duration holds
START_MODES: Final = {
    name.removeprefix("START_MODE_").lower(): value
    for name, value in deployment_service_pb2.StartMode.items()
    if value
}
STORAGES: Final = {
    name.removeprefix("STORAGE_").lower(): value
    for name, value in deployment_service_pb2.Storage.items()
    if value
}

WEIGHTS: Final = {
    name.removeprefix("WEIGHTS_").lower(): value
    for name, value in deployment_service_pb2.Weights.items()
    if value
}


class Checkpoint(TypedDict, total=False):
    """The keys of ``checkpoint``; a key that is left out is as in ``DEFAULT_CHECKPOINT``."""

    enabled: bool
    ttl: Seconds
    storage: str
    weights: str


DEFAULT_CHECKPOINT: Final[Checkpoint] = {
    "enabled": True, "ttl": 3600, "storage": "local", "weights": "detached",
}  # fmt: skip


class DeploySettings(TypedDict, total=False):
    """The keyword arguments of ``deploy``.

    name: the deployment's id; derived from the model's name when left out.
    engine: ``causal_lm`` or ``embedding``; read from the model's configuration when left out.
    idle_timeout: seconds without a request after which its instance parks or stops.
    park_timeout: seconds parked after which the process ends and only the snapshot remains.
    prewarm: start, and capture, when the deployment is created rather than at its first request.
    """

    name: str | None
    engine: str | None
    idle_timeout: Seconds | None
    park_timeout: Seconds | None
    prewarm: bool


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of ``generate`` and ``stream``.

    For ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty`` that are left out, the model's
    ``generation_config.json`` decides; where it says nothing, they have no effect.

    messages: a conversation instead of a prompt: ``[{"role": "user", "content": "Hello"}]``.
    max_new_tokens: 256 when left out.
    temperature: 0 or left out: always take the likeliest token.
    top_p: sample only from the likeliest tokens that together reach this probability.
    seed: makes sampling repeatable; answer ``i`` of ``n`` is sampled with ``seed + i``.
    stop: the answer ends before the first of these strings.
    top_k: sample only from this many of the likeliest tokens; 0: from all.
    min_p: sample only from tokens whose probability is at least this fraction of the likeliest one's.
    repetition_penalty: above 1 makes tokens of the prompt and the answer less likely.
    presence_penalty: subtracted from the logits of tokens that are in the answer already.
    frequency_penalty: the same, once for each time the token is in the answer.
    logit_bias: added to logits, by token id; -100 rules a token out.
    stop_token_ids: the answer ends before the first of these tokens.
    ignore_eos: go on to ``max_new_tokens`` even where the model would end its answer.
    min_new_tokens: the answer has at least this many tokens.
    logprobs: report the log-probability of each token, and of this many of the likeliest at its position.
    n: how many answers; they are in ``Generation.answers``.
    timeout: seconds for the whole answer, including a start.
    """

    messages: Sequence[Mapping[str, str]] | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    min_new_tokens: int | None
    logprobs: int | None
    n: int | None
    timeout: float | None


def full_name(value: str, collection: str, field: str) -> str:
    """The resource name of ``value``, an id with or without its collection.

    Raises:
        InvalidArgument: INVALID_NAME or INVALID_ID.
    """
    name = value if "/" in value else names.build(collection, value)
    names.parse(name, collection, field)
    return name


def deployment_id(model: str) -> str:
    """The id of a deployment that the caller did not name: ``qwen3-0-6b`` for ``org/Qwen3-0.6B``.

    Raises:
        InvalidArgument: NAME_REQUIRED, the model's name has no letter or digit.
    """
    label = re.sub(r"[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")
    if not label:
        raise InvalidArgument(
            "NAME_REQUIRED",
            f"no id can be derived from the model's name {model[:120]!r}; give the deployment a name",
            field="name",
            metadata={"model": model[:120]},
        )
    if not label[0].isalpha():
        label = f"m-{label}"
    return label[:63].rstrip("-")


def deployment_message(
    model: str,
    start_mode: str,
    checkpoint: Checkpoint | None,
    *,
    engine: str | None = None,
    idle_timeout: Seconds | None = None,
    park_timeout: Seconds | None = None,
) -> tuple[deployment_service_pb2.Deployment, list[str]]:
    """The deployment that a caller asks for, and the paths of the mutable fields that it sets.

    Raises:
        InvalidArgument: an argument is wrong; its field is named.
    """
    _text(model, "model")
    mode = _choice(start_mode, START_MODES, "start_mode")
    message = deployment_service_pb2.Deployment(model=_node_path(model), engine=engine or "", start_mode=mode)
    paths = ["start_mode"]
    if checkpoint is not None or start_mode == "checkpoint":
        message.checkpoint.CopyFrom(_checkpoint(checkpoint or {}))
        paths.append("checkpoint")
    if start_mode == "checkpoint" and not message.checkpoint.enabled:
        raise InvalidArgument(
            "CHECKPOINT_DISABLED",
            'start_mode "checkpoint" needs checkpoint["enabled"] to be true; use "cold" or "warm" without it',
            field="checkpoint.enabled",
        )
    for field, value in (("idle_timeout", idle_timeout), ("park_timeout", park_timeout)):
        if value is not None:
            getattr(message, field).CopyFrom(duration(to_seconds(value, field)))
            paths.append(field)
    return message, paths


def generate_request(
    deployment: str, prompt: str | None = None, **options: Unpack[GenerateOptions]
) -> inference_service_pb2.GenerateRequest:
    """A request for text.

    Args:
        deployment: its full name.
        prompt: text to continue, as it is.
        options: see ``GenerateOptions``; ``timeout`` is not part of a request.

    Raises:
        InvalidArgument: an argument is wrong; its field is named.
    """
    fields: dict[str, Any] = {
        **options,
        "prompt": prompt,
        "messages": [_message(message, index) for index, message in enumerate(options.get("messages") or ())],
    }
    fields.pop("timeout", None)
    if isinstance(stop := fields.get("stop"), str):
        fields["stop"] = [stop]
    try:
        limits.check_generate(fields)
        return inference_service_pb2.GenerateRequest(deployment=deployment, **fields)
    except (TypeError, ValueError) as error:
        raise InvalidArgument("INVALID_REQUEST", f"the request cannot be sent: {error}") from error


def embed_request(deployment: str, inputs: str | Sequence[str]) -> inference_service_pb2.EmbedRequest:
    """A request for the embeddings of one or several texts.

    Raises:
        InvalidArgument: there is none, or one is empty or not a string.
    """
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    try:
        limits.check_embed(texts)
        return inference_service_pb2.EmbedRequest(deployment=deployment, inputs=texts)
    except TypeError as error:
        raise InvalidArgument("INVALID_REQUEST", f"the request cannot be sent: {error}") from error


def to_seconds(value: Seconds, field: str) -> float:
    """Seconds of a number or a ``timedelta``.

    Raises:
        InvalidArgument: INVALID_DURATION, not a duration, negative or longer than ten thousand years.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_SECONDS:
        raise InvalidArgument(
            "INVALID_DURATION",
            f"{field} must be a number of seconds from 0 to {LONGEST_SECONDS}; got {value!r}",
            field=field,
            metadata={"value": str(value)},
        )
    return float(value)


def _checkpoint(given: Mapping[str, Any]) -> deployment_service_pb2.CheckpointSettings:
    unknown = sorted(given.keys() - DEFAULT_CHECKPOINT.keys())
    if unknown:
        raise InvalidArgument(
            "UNKNOWN_SETTING",
            f"checkpoint has no setting {unknown[0]!r}; it has {', '.join(DEFAULT_CHECKPOINT)}",
            field=f"checkpoint.{unknown[0]}",
        )
    settings: dict[str, Any] = {**DEFAULT_CHECKPOINT, **given}
    if not isinstance(settings["enabled"], bool):
        raise InvalidArgument(
            "NOT_A_BOOLEAN", 'checkpoint["enabled"] must be True or False', field="checkpoint.enabled"
        )
    return deployment_service_pb2.CheckpointSettings(
        enabled=settings["enabled"],
        ttl=duration(to_seconds(settings["ttl"], "checkpoint.ttl")),
        storage=_choice(settings["storage"], STORAGES, "checkpoint.storage"),
        weights=_choice(settings["weights"], WEIGHTS, "checkpoint.weights"),
    )


def _choice(value: str, choices: Mapping[str, Any], field: str) -> Any:
    if value not in choices:
        raise InvalidArgument(
            "UNKNOWN_CHOICE",
            f"{field} must be one of {', '.join(choices)}; got {value!r}",
            field=field,
            metadata={"value": str(value)},
        )
    return choices[value]


def _text(value: object, field: str) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidArgument("EMPTY", f"{field} must be a string that is not empty", field=field)


def _message(message: Mapping[str, str], index: int) -> inference_pb2.ChatMessage:
    if set(message) != {"role", "content"}:
        raise InvalidArgument(
            "INVALID_MESSAGE",
            f"messages[{index}] must have exactly the keys role and content",
            field=f"messages[{index}]",
        )
    return inference_pb2.ChatMessage(role=message["role"], content=message["content"])


def _node_path(model: str) -> str:
    """The model with a relative path made absolute: a node does not know the caller's directory or home."""
    return str(Path(model).expanduser().resolve()) if model.startswith((".", "~")) else model

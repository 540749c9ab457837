"""What a caller may ask of a model: checked before anything is started for it."""

from __future__ import annotations

import math
from typing import Final

from dumont.controller.v1 import inference_service_pb2 as inference_pb
from dumont.errors import InvalidArgument

DEFAULT_TOKENS: Final = 256
STOP_LIMIT: Final = 16
STOP_LENGTH: Final = 256
INPUTS_LIMIT: Final = 2048


def check_generate(request: inference_pb.GenerateRequest, max_new_tokens: int) -> None:
    """Raise unless the request makes sense.

    Args:
        request: as received.
        max_new_tokens: the most that one answer may have.

    Raises:
        InvalidArgument: with the field named.
    """
    if request.messages and request.prompt:
        raise InvalidArgument("PROMPT_AND_MESSAGES", "give a prompt or messages, not both", field="prompt")
    if not request.messages and not request.prompt:
        raise InvalidArgument("EMPTY_PROMPT", "give a prompt or messages", field="prompt")
    for number, message in enumerate(request.messages):
        if not message.role:
            field = f"messages[{number}].role"
            raise InvalidArgument("EMPTY_ROLE", f"{field} must be system, user or assistant", field=field)
    _check_tokens(request.max_new_tokens, max_new_tokens)
    _check_sampling(request)
    _check_stop(list(request.stop))


def check_embed(request: inference_pb.EmbedRequest) -> None:
    """Raise unless the request makes sense.

    Raises:
        InvalidArgument: with the field named.
    """
    if not request.inputs:
        raise InvalidArgument("EMPTY_INPUTS", "give at least one input", field="inputs")
    if len(request.inputs) > INPUTS_LIMIT:
        raise InvalidArgument(
            "TOO_MANY_INPUTS",
            f"inputs may have at most {INPUTS_LIMIT} entries; got {len(request.inputs)}",
            field="inputs",
            metadata={"limit": str(INPUTS_LIMIT), "value": str(len(request.inputs))},
        )
    for number, text in enumerate(request.inputs):
        if not text:
            field = f"inputs[{number}]"
            raise InvalidArgument("EMPTY_INPUT", f"{field} must not be empty", field=field)


def _check_tokens(value: int, limit: int) -> None:
    if value < 0:
        raise InvalidArgument(
            "NEGATIVE_TOKENS",
            f"max_new_tokens must not be negative; got {value}",
            field="max_new_tokens",
            metadata={"value": str(value)},
        )
    if value > limit:
        raise InvalidArgument(
            "TOO_MANY_TOKENS",
            f"max_new_tokens may be at most {limit}; got {value}",
            field="max_new_tokens",
            metadata={"limit": str(limit), "value": str(value)},
        )


def _check_sampling(request: inference_pb.GenerateRequest) -> None:
    heat, top_p = request.temperature, request.top_p
    if not (math.isfinite(heat) and 0 <= heat <= 2):
        raise InvalidArgument(
            "INVALID_TEMPERATURE",
            f"temperature must be from 0 to 2; got {heat:g}",
            field="temperature",
            metadata={"value": f"{heat:g}"},
        )
    if request.HasField("top_p") and not 0 < top_p <= 1:
        raise InvalidArgument(
            "INVALID_TOP_P",
            f"top_p must be above 0 and at most 1; got {top_p:g}",
            field="top_p",
            metadata={"value": f"{top_p:g}"},
        )


def _check_stop(stop: list[str]) -> None:
    if len(stop) > STOP_LIMIT:
        raise InvalidArgument(
            "TOO_MANY_STOPS", f"stop may have at most {STOP_LIMIT} entries; got {len(stop)}", field="stop"
        )
    for number, text in enumerate(stop):
        if not 0 < len(text) <= STOP_LENGTH:
            field = f"stop[{number}]"
            raise InvalidArgument(
                "INVALID_STOP", f"{field} must have 1 to {STOP_LENGTH} characters", field=field
            )

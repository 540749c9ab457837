"""What a caller may ask of a model: checked before anything is started for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dumont.controller.v1 import inference_service_pb2 as inference_pb
from dumont.errors import InvalidArgument

DEFAULT_TOKENS: Final = 256
STOP_LIMIT: Final = 16
STOP_LENGTH: Final = 256
STOP_TOKENS_LIMIT: Final = 64
BIASES_LIMIT: Final = 1024
LOGPROBS_LIMIT: Final = 20
ANSWERS_LIMIT: Final = 16
INT32_MAX: Final = 2**31 - 1
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
    _check_min_tokens(request)
    _check_sampling(request)
    _check_stop(list(request.stop))
    _check_stop_tokens(list(request.stop_token_ids))


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


@dataclass(frozen=True, slots=True)
class _Range:
    """The values that a field may have; ``above`` leaves the lowest out."""

    field: str
    lowest: float
    highest: float
    above: bool = False

    def check(self, value: float, field: str = "") -> None:
        """Raise InvalidArgument, INVALID_<FIELD>, unless ``value`` lies within; NaN does not."""
        if self.lowest <= value <= self.highest and not (self.above and value == self.lowest):
            return
        field = field or self.field
        allowed = f"above {self.lowest:g} and at most" if self.above else f"from {self.lowest:g} to"
        raise InvalidArgument(
            f"INVALID_{self.field.upper()}",
            f"{field} must be {allowed} {self.highest:g}; got {value:g}",
            field=field,
            metadata={"value": f"{value:g}"},
        )


SAMPLING: Final = (
    _Range("temperature", 0, 2),
    _Range("top_p", 0, 1, above=True),
    _Range("top_k", 0, INT32_MAX),
    _Range("min_p", 0, 1),
    _Range("repetition_penalty", 0, 10, above=True),
    _Range("presence_penalty", -2, 2),
    _Range("frequency_penalty", -2, 2),
    _Range("logprobs", 0, LOGPROBS_LIMIT),
)
BIAS: Final = _Range("logit_bias", -100, 100)
ANSWERS: Final = _Range("n", 0, ANSWERS_LIMIT)
TOKEN: Final = _Range("token_id", 0, INT32_MAX)


def _check_sampling(request: inference_pb.GenerateRequest) -> None:
    for allowed in SAMPLING:
        if request.HasField(allowed.field):  # type: ignore[arg-type]
            allowed.check(getattr(request, allowed.field))
    ANSWERS.check(request.n)
    if len(request.logit_bias) > BIASES_LIMIT:
        raise InvalidArgument(
            "TOO_MANY_BIASES",
            f"logit_bias may have at most {BIASES_LIMIT} entries; got {len(request.logit_bias)}",
            field="logit_bias",
            metadata={"limit": str(BIASES_LIMIT), "value": str(len(request.logit_bias))},
        )
    for token, bias in request.logit_bias.items():
        TOKEN.check(token, "logit_bias")
        BIAS.check(bias, f"logit_bias[{token}]")


def _check_min_tokens(request: inference_pb.GenerateRequest) -> None:
    most = request.max_new_tokens or DEFAULT_TOKENS
    _Range("min_new_tokens", 0, most).check(request.min_new_tokens)


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


def _check_stop_tokens(tokens: list[int]) -> None:
    if len(tokens) > STOP_TOKENS_LIMIT:
        raise InvalidArgument(
            "TOO_MANY_STOPS",
            f"stop_token_ids may have at most {STOP_TOKENS_LIMIT} entries; got {len(tokens)}",
            field="stop_token_ids",
        )
    for number, token in enumerate(tokens):
        TOKEN.check(token, f"stop_token_ids[{number}]")

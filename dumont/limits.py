"""What a request for inference may ask: one table of ranges and reasons for every side of the API.

The client checks before it sends, the controller before it starts anything, the model host before it
computes. Fields are named as in the proto. Imports neither gRPC nor protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from dumont.errors import InvalidArgument

INT32_MAX: Final = 2**31 - 1
# For a request that sets no max_new_tokens.
DEFAULT_MAX_NEW_TOKENS: Final = 256

STOP_LENGTH: Final = 256
# Of a message between a node and whoever calls it, and of what a gRPC client takes unless it is told to take
# more.
MESSAGE_BYTES: Final = 4 * 1024 * 1024
# Of a request, encoded. The controller adds the name of an instance.
REQUEST_BYTES: Final = MESSAGE_BYTES - 1024
# Of an answer that is one message. The controller adds how the instance was started.
ANSWER_BYTES: Final = MESSAGE_BYTES - 16 * 1024
# What a vector takes beside its values, at most.
VECTOR_BYTES: Final = 16

# Who may speak in a conversation; chat templates know no others.
ROLES: Final = frozenset({"system", "user", "assistant"})


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a field may have; ``above`` leaves the lowest out."""

    field: str
    lowest: float
    highest: float
    above: bool = False

    def check(self, value: float, field: str = "") -> None:
        """Raise unless ``value`` lies within; NaN does not.

        Args:
            value: of the request.
            field: its path in the request, where that is not the field's name.

        Raises:
            InvalidArgument: INVALID_<FIELD>.
        """
        if self.lowest <= value <= self.highest and not (self.above and value == self.lowest):
            return
        path = field or self.field
        allowed = f"above {self.lowest:g} and at most" if self.above else f"from {self.lowest:g} to"
        raise InvalidArgument(
            f"INVALID_{self.field.upper()}",
            f"{path} must be {allowed} {self.highest:.10g}; got {value:.10g}",
            field=path,
            metadata={"value": f"{value:.10g}", "limit": f"{self.highest:.10g}"},
        )


@dataclass(frozen=True, slots=True)
class Count:
    """How many entries a field may have, and the reason when there are more."""

    field: str
    most: int
    reason: str

    def check(self, entries: int) -> None:
        """Raise unless the field may have this many ``entries``.

        Raises:
            InvalidArgument: the count's reason.
        """
        if entries > self.most:
            raise InvalidArgument(
                self.reason,
                f"{self.field} may have at most {self.most} entries; got {entries}",
                field=self.field,
                metadata={"limit": str(self.most), "value": str(entries)},
            )


RANGES: Final = (
    Range("max_new_tokens", 1, INT32_MAX),
    Range("temperature", 0, 2),
    Range("top_p", 0, 1, above=True),
    Range("top_k", 0, INT32_MAX),
    Range("min_p", 0, 1),
    Range("repetition_penalty", 0, 10, above=True),
    Range("presence_penalty", -2, 2),
    Range("frequency_penalty", -2, 2),
    Range("min_new_tokens", 0, INT32_MAX),
    Range("logprobs", 0, 20),
    Range("n", 1, 16),
)
COUNTS: Final = (
    Count("stop", 16, "TOO_MANY_STOPS"),
    Count("stop_token_ids", 64, "TOO_MANY_STOPS"),
    Count("logit_bias", 1024, "TOO_MANY_BIASES"),
)
INPUTS: Final = Count("inputs", 2048, "TOO_MANY_INPUTS")
TOKEN_ID: Final = Range("token_id", 0, INT32_MAX)
LOGIT_BIAS: Final = Range("logit_bias", -100, 100)


def check_generate(fields: Mapping[str, Any], max_new_tokens: int = INT32_MAX) -> None:
    """Raise unless a request for text makes sense.

    Args:
        fields: of the request, by their names; one that is unset is absent or None. ``messages`` have
            a ``role`` each.
        max_new_tokens: the most tokens that one answer may have here.

    Raises:
        InvalidArgument: with the field named. Reasons: PROMPT_AND_MESSAGES, EMPTY_PROMPT, EMPTY_ROLE,
            INVALID_ROLE, INVALID_<FIELD>, INVALID_TOKEN_ID, TOO_MANY_STOPS, TOO_MANY_BIASES.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    _check_prompt(given)
    for allowed in RANGES:
        if allowed.field in given:
            allowed.check(given[allowed.field])
    most = replace(RANGES[0], highest=max_new_tokens)
    most.check(given.get(most.field, 1))
    wanted = given.get(most.field, min(DEFAULT_MAX_NEW_TOKENS, max_new_tokens))
    Range("min_new_tokens", 0, wanted).check(given.get("min_new_tokens", 0))
    for count in COUNTS:
        count.check(len(given.get(count.field, ())))
    for number, text in enumerate(given.get("stop", ())):
        if not 0 < len(text) <= STOP_LENGTH:
            field = f"stop[{number}]"
            raise InvalidArgument(
                "INVALID_STOP", f"{field} must have 1 to {STOP_LENGTH} characters", field=field
            )
    for number, token in enumerate(given.get("stop_token_ids", ())):
        TOKEN_ID.check(token, f"stop_token_ids[{number}]")
    for token, bias in given.get("logit_bias", {}).items():
        TOKEN_ID.check(token, "logit_bias")
        LOGIT_BIAS.check(bias, f"logit_bias[{token}]")


def check_embed(inputs: Sequence[str]) -> None:
    """Raise unless texts can be embedded.

    Raises:
        InvalidArgument: EMPTY_INPUTS, EMPTY_INPUT or TOO_MANY_INPUTS, with the field named.
    """
    if not inputs:
        raise InvalidArgument("EMPTY_INPUTS", "give at least one input", field="inputs")
    INPUTS.check(len(inputs))
    for number, text in enumerate(inputs):
        if not text:
            field = f"inputs[{number}]"
            raise InvalidArgument("EMPTY_INPUT", f"{field} must not be empty", field=field)


def check_answer(inputs: int, values: int) -> None:
    """Raise unless the vectors of texts fit into one answer.

    Args:
        inputs: how many texts there are.
        values: of each vector; 0 if that is not known.

    Raises:
        InvalidArgument: TOO_MANY_INPUTS.
    """
    most = ANSWER_BYTES // (4 * values + VECTOR_BYTES)
    if values and inputs > most:
        raise InvalidArgument(
            "TOO_MANY_INPUTS",
            f"{inputs} vectors of {values} values are more than an answer takes; send at most {most} inputs "
            "at once",
            field="inputs",
            metadata={"limit": str(most), "value": str(inputs)},
        )


def check_size(size: int) -> None:
    """Raise unless a node takes a request of ``size`` bytes, encoded.

    Raises:
        InvalidArgument: REQUEST_TOO_LARGE.
    """
    if size > REQUEST_BYTES:
        raise InvalidArgument(
            "REQUEST_TOO_LARGE",
            f"a request may have at most {REQUEST_BYTES} bytes; this one has {size}; send less text at once",
            metadata={"limit": str(REQUEST_BYTES), "value": str(size)},
        )


def _check_prompt(given: Mapping[str, Any]) -> None:
    prompt, messages = given.get("prompt"), given.get("messages")
    if prompt and messages:
        raise InvalidArgument("PROMPT_AND_MESSAGES", "give a prompt or messages, not both", field="prompt")
    if not prompt and not messages:
        raise InvalidArgument("EMPTY_PROMPT", "give a prompt or messages", field="prompt")
    for number, message in enumerate(messages or ()):
        if message.role not in ROLES:
            field = f"messages[{number}].role"
            reason = "INVALID_ROLE" if message.role else "EMPTY_ROLE"
            raise InvalidArgument(
                reason,
                f"{field} must be system, user or assistant; got {message.role[:40]!r}",
                field=field,
                metadata={"value": message.role[:40]},
            )

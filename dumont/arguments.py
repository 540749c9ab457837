"""Turns the arguments of client calls into requests, and refuses what is plainly wrong before any call."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypedDict, TypeVar, Unpack

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from dumont import engines, limits, names
from dumont.controller.v1 import deployment_service_pb2, inference_service_pb2
from dumont.convert import duration
from dumont.errors import InvalidArgument
from dumont.inference.v1 import inference_pb2
from dumont.types import StartProgress

Seconds = float | timedelta
Request = TypeVar("Request", bound=Message)

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
    """The keys of ``checkpoint``.

    enabled: whether snapshots are made; True when left out.
    ttl: seconds that a snapshot outlives its last use; a day when left out.
    storage: ``local``, the default, or ``s3`` to publish snapshots as well.
    weights: ``detached``, the default, or ``included`` for snapshots that carry them.
    """

    enabled: bool
    ttl: Seconds
    storage: str
    weights: str


DEFAULT_START_MODE: Final = "checkpoint"
EXAMPLE_CHECKPOINT: Final[Checkpoint] = {"enabled": True, "ttl": 3600}


class DeploySettings(TypedDict, total=False):
    """The keyword arguments of ``deploy``.

    name: the deployment's id; derived from the model's name when left out.
    engine: ``causal_lm`` or ``embedding``, read from the model's configuration when left out; or ``vllm``, on
        nodes where it is installed.
    engine_options: arguments of the engine: those of ``vllm``, such as ``{"max_model_len": 4096}``, are in
        docs/vllm.md; ``causal_lm`` takes ``kv_cache_memory_bytes``, the size of its KV cache.
    idle_timeout: seconds without a request after which its instance parks or stops.
    park_timeout: seconds parked after which the process ends and only the snapshot remains.
    prewarm: start, and capture, now rather than at the next request.
    wait: until that start has ended; implies ``prewarm``.
    progress: called with a ``StartProgress`` at each step while this waits; by the synchronous client in
        another thread.
    priority: -1000 to 1000, 0 when left out; a busy instance yields to a deployment of a higher priority.
    min_instances: instances that serve without requests; 1 for ``warm``, else 0 when left out.
    max_instances: instances that may serve at a time; 1 when left out.
    """

    name: str | None
    engine: str | None
    engine_options: Mapping[str, Any] | None
    idle_timeout: Seconds | None
    park_timeout: Seconds | None
    prewarm: bool
    priority: int | None
    min_instances: int | None
    max_instances: int | None
    wait: bool
    progress: Callable[[StartProgress], None] | None


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
    progress: called with a ``StartProgress`` at each step of a start, if one is needed; by the synchronous
        client in another thread.
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
    timeout: Seconds | None
    progress: Callable[[StartProgress], None] | None


# For arguments that other libraries have.
HINTS: Final = {
    "max_tokens": "did you mean max_new_tokens?",
    "max_completion_tokens": "did you mean max_new_tokens?",
    "max_length": "did you mean max_new_tokens, which does not count the prompt?",
    "stream": "call stream() instead, which gives the answer in pieces",
    "do_sample": "a temperature above 0 samples",
    "num_return_sequences": "did you mean n?",
    "best_of": "did you mean n?",
    "stop_sequences": "did you mean stop?",
    "stop_strings": "did you mean stop?",
    "eos_token_id": "did you mean stop_token_ids?",
    "model": "a deployment has its model already; deploy() takes one",
    "input": "give the prompt first, or messages",
}
EXAMPLE_MESSAGE: Final = {"role": "user", "content": "Hello"}


def full_name(value: str, collection: str, field: str) -> str:
    """The resource name of ``value``, an id with or without its collection.

    Raises:
        InvalidArgument: INVALID_NAME or INVALID_ID.
    """
    if not isinstance(value, str):
        raise _wrong_type(field, f"a string such as {collection}/ID or ID", value)
    name = value if "/" in value else names.build(collection, value)
    names.parse(name, collection, field)
    return name


def deployment_id(model: str | os.PathLike[str]) -> str:
    """The id of a deployment that the caller did not name: ``qwen3-0-6b`` for ``org/Qwen3-0.6B``.

    Raises:
        InvalidArgument: NAME_REQUIRED, the model's name has no letter or digit.
    """
    label = re.sub(r"[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")
    if not label:
        shown = str(model)[:120]
        raise InvalidArgument(
            "NAME_REQUIRED",
            f"no id can be derived from the model's name {shown!r}; give the deployment a name",
            field="name",
            metadata={"model": shown},
        )
    if not label[0].isalpha():
        label = f"m-{label}"
    return label[:63].rstrip("-")


def deployment_message(
    model: str | os.PathLike[str],
    start_mode: str | None,
    checkpoint: Checkpoint | None,
    *,
    engine: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    idle_timeout: Seconds | None = None,
    park_timeout: Seconds | None = None,
    priority: int | None = None,
    min_instances: int | None = None,
    max_instances: int | None = None,
) -> tuple[deployment_service_pb2.Deployment, list[str]]:
    """The deployment that a caller asks for, and the paths of the mutable fields that it sets.

    What is left out has the controller's default in a new deployment, and stays as it is in an existing one;
    the start mode of a new one is then ``DEFAULT_START_MODE``.

    Raises:
        InvalidArgument: an argument is wrong; its field is named.
    """
    mode = _choice(start_mode or DEFAULT_START_MODE, START_MODES, "start_mode")
    message = request(deployment_service_pb2.Deployment, model=_model(model), engine=engine)
    message.start_mode = mode
    engines.check_engine(message.engine)
    options = engines.check_options(message.engine, {} if engine_options is None else engine_options)
    if options:
        message.engine_options.update(options)
    paths = [] if start_mode is None else ["start_mode"]
    if checkpoint is not None:
        message.checkpoint.CopyFrom(_checkpoint(checkpoint))
        paths += [f"checkpoint.{key}" for key in checkpoint]
    if start_mode == "checkpoint" and checkpoint is not None and not message.checkpoint.enabled:
        raise InvalidArgument(
            "CHECKPOINT_DISABLED",
            'start_mode "checkpoint" needs checkpoint["enabled"] to be true; use "cold" or "warm" without it',
            field="checkpoint.enabled",
        )
    for field, value in (("idle_timeout", idle_timeout), ("park_timeout", park_timeout)):
        if value is not None:
            getattr(message, field).CopyFrom(duration(to_seconds(value, field)))
            paths.append(field)
    numbers = {"priority": priority, "min_instances": min_instances, "max_instances": max_instances}
    given = {field: value for field, value in numbers.items() if value is not None}
    _check_types(deployment_service_pb2.Deployment, given)
    for field, number in given.items():
        setattr(message, field, number)
        paths.append(field)
    return message, paths


def generate_request(
    deployment: str, prompt: str | None = None, **options: Unpack[GenerateOptions]
) -> inference_service_pb2.GenerateRequest:
    """A request for text.

    Args:
        deployment: its full name.
        prompt: text to continue, as it is.
        options: see ``GenerateOptions``; ``timeout`` and ``progress`` are not part of a request.

    Raises:
        InvalidArgument: an argument is wrong; its field is named.
    """
    check_options(options, GenerateOptions.__annotations__, "generate")
    if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes):
        raise InvalidArgument(
            "WRONG_TYPE", "prompt must be a string; pass a conversation as messages=[…]", field="prompt"
        )
    given: dict[str, Any] = dict(options)
    to_timeout(given.pop("timeout", None))
    check_callback(given.pop("progress", None), "progress")
    if given.get("messages") is not None:
        given["messages"] = _messages(given["messages"])
    if isinstance(stop := given.get("stop"), str):
        given["stop"] = [stop]
    fields = {"deployment": deployment, "prompt": prompt, **given}
    _check_types(inference_service_pb2.GenerateRequest, fields)
    limits.check_generate(fields)
    made = request(inference_service_pb2.GenerateRequest, **fields)
    limits.check_size(made.ByteSize())
    return made


def embed_request(deployment: str, inputs: str | Iterable[str]) -> inference_service_pb2.EmbedRequest:
    """A request for the embeddings of one or several texts.

    Raises:
        InvalidArgument: there is none, or one is empty or not a string.
    """
    if inputs is None:
        raise _wrong_type("inputs", "a text or a list of texts", inputs)
    # Anything may be handed over here; what is no list of texts is refused by its type.
    texts: Any = [inputs] if isinstance(inputs, str) else inputs
    texts = list(texts) if isinstance(texts, Iterator) else texts
    _check_types(inference_service_pb2.EmbedRequest, {"inputs": texts})
    limits.check_embed(texts)
    made = request(inference_service_pb2.EmbedRequest, deployment=deployment, inputs=texts)
    limits.check_size(made.ByteSize())
    return made


def to_seconds(value: Seconds, field: str) -> float:
    """Seconds of a number or a ``timedelta``.

    Raises:
        InvalidArgument: INVALID_DURATION, not a duration, negative or longer than ten thousand years.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if not _is_number(value) or not 0 <= value <= LONGEST_SECONDS:
        raise InvalidArgument(
            "INVALID_DURATION",
            f"{field} must be a number of seconds from 0 to {LONGEST_SECONDS}; got {value!r}",
            field=field,
            metadata={"value": str(value)},
        )
    return float(value)


def to_timeout(value: Seconds | None) -> float | None:
    """The seconds of a call's own timeout; None: it waits for as long as it takes.

    Raises:
        InvalidArgument: INVALID_DURATION.
    """
    return None if value is None else to_seconds(value, "timeout")


def check_callback(value: object, field: str) -> None:
    """Raise unless ``value`` is None or can be called.

    Raises:
        InvalidArgument: WRONG_TYPE.
    """
    if value is not None and not callable(value):
        raise _wrong_type(field, "a function", value)


def check_options(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise for a keyword argument that ``what`` does not have, and name the one that was probably meant.

    Raises:
        InvalidArgument: UNKNOWN_OPTION.
    """
    known = tuple(known)
    for name in given:
        if name in known:
            continue
        if name in HINTS:
            advice = HINTS[name]
        elif near := get_close_matches(name, known, 1):
            advice = f"did you mean {near[0]}?"
        else:
            advice = f"it has {', '.join(known)}"
        raise InvalidArgument(
            "UNKNOWN_OPTION",
            f"{what} has no argument {name[:80]!r}; {advice}",
            field=name,
            metadata={"option": name[:80]},
        )


def request(kind: type[Request], **fields: Any) -> Request:
    """A message with these fields; None leaves one unset.

    Raises:
        InvalidArgument: WRONG_TYPE, a value is not of its field's type; UNSENDABLE, it has no encoding.
    """
    _check_types(kind, fields)
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise InvalidArgument("UNSENDABLE", f"the request cannot be sent: {error}") from error


_SCALARS: Final[Mapping[int, tuple[str, Any]]] = {
    FieldDescriptor.CPPTYPE_BOOL: ("True or False", bool),
    FieldDescriptor.CPPTYPE_STRING: ("a string", str),
    FieldDescriptor.CPPTYPE_FLOAT: ("a number", numbers.Real),
    FieldDescriptor.CPPTYPE_DOUBLE: ("a number", numbers.Real),
    FieldDescriptor.CPPTYPE_INT32: ("a whole number", numbers.Integral),
    FieldDescriptor.CPPTYPE_INT64: ("a whole number", numbers.Integral),
}


def _check_types(kind: type[Message], fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if value is not None:
            _check_type(kind.DESCRIPTOR.fields_by_name[name], value, name)


def _check_type(field: Any, value: Any, path: str) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        if not isinstance(value, Mapping):
            raise _wrong_type(path, "a mapping", value)
        entry = field.message_type.fields_by_name
        for key, item in value.items():
            _check_one(entry["key"], key, f"a key of {path}")
            _check_one(entry["value"], item, f"{path}[{key!r}]")
    elif field.is_repeated:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
            raise _wrong_type(path, "a list", value)
        for index, item in enumerate(value):
            _check_one(field, item, f"{path}[{index}]")
    else:
        _check_one(field, value, path)


def _check_one(field: Any, value: Any, path: str) -> None:
    words, kind = _SCALARS.get(field.cpp_type, ("", object))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        raise _wrong_type(path, words, value)


def _wrong_type(path: str, wanted: str, value: Any) -> InvalidArgument:
    shown = repr(value)[:80]
    return InvalidArgument(
        "WRONG_TYPE",
        f"{path} must be {wanted}; got {shown}, a value of type {type(value).__name__}",
        field=path,
        metadata={"value": shown},
    )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _checkpoint(given: Mapping[str, Any]) -> deployment_service_pb2.CheckpointSettings:
    if not isinstance(given, Mapping):
        raise _wrong_type("checkpoint", f"a dict such as {EXAMPLE_CHECKPOINT}", given)
    known = Checkpoint.__annotations__
    unknown = sorted(map(str, given.keys() - known.keys()))
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise InvalidArgument(
            "UNKNOWN_SETTING",
            f"checkpoint has no setting {unknown[0]!r}; {advice}",
            field=f"checkpoint.{unknown[0]}",
        )
    # Whoever has settings for snapshots wants some, unless they say that they do not.
    enabled = given.get("enabled", True)
    if not isinstance(enabled, bool):
        raise InvalidArgument(
            "NOT_A_BOOLEAN", 'checkpoint["enabled"] must be True or False', field="checkpoint.enabled"
        )
    message = deployment_service_pb2.CheckpointSettings(enabled=enabled)
    if "ttl" in given:
        message.ttl.CopyFrom(duration(to_seconds(given["ttl"], "checkpoint.ttl")))
    if "storage" in given:
        message.storage = _choice(given["storage"], STORAGES, "checkpoint.storage")
    if "weights" in given:
        message.weights = _choice(given["weights"], WEIGHTS, "checkpoint.weights")
    return message


def _choice(value: str, choices: Mapping[str, Any], field: str) -> Any:
    if not isinstance(value, str) or value not in choices:
        near = get_close_matches(str(value), choices, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise InvalidArgument(
            "UNKNOWN_CHOICE",
            f"{field} must be one of {', '.join(choices)}; got {value!r}{meant}",
            field=field,
            metadata={"value": str(value)},
        )
    return choices[value]


def _messages(given: object) -> list[inference_pb2.ChatMessage]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise _wrong_type("messages", f"a list of messages such as {EXAMPLE_MESSAGE}", given)
    return [_message(message, index) for index, message in enumerate(given)]


def _message(message: object, index: int) -> inference_pb2.ChatMessage:
    path = f"messages[{index}]"
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise InvalidArgument(
            "INVALID_MESSAGE",
            f"{path} must have exactly the keys role and content, such as {EXAMPLE_MESSAGE}; "
            f"got {str(message)[:80]}",
            field=path,
        )
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            wanted = "a string"
            if key == "content" and isinstance(message[key], Sequence):
                wanted = "a string, as models here take text only; join the texts of its parts"
            raise _wrong_type(f"{path}.{key}", wanted, message[key])
    return request(inference_pb2.ChatMessage, **message)


def _model(model: object) -> str:
    if isinstance(model, os.PathLike):
        return str(Path(model).expanduser().absolute())
    if not isinstance(model, str) or not model:
        raise InvalidArgument("EMPTY", "model must be a string that is not empty", field="model")
    return _node_path(model)


def _node_path(model: str) -> str:
    """The model with a relative path made absolute: a node does not know the caller's directory or home."""
    return str(Path(model).expanduser().resolve()) if model.startswith((".", "~")) else model

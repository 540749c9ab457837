"""JSON objects as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct


def to_struct(values: Mapping[str, Any]) -> Struct | None:
    """A JSON object as a message; None, which leaves a field unset, for an empty one."""
    if not values:
        return None
    message = Struct()
    message.update(dict(values))
    return message


def from_struct(message: Struct) -> dict[str, Any]:
    """A JSON object from a message, with whole numbers as integers: the message has only floats."""
    return {name: _whole(value) for name, value in MessageToDict(message).items()}


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {name: _whole(item) for name, item in value.items()} if isinstance(value, dict) else value

"""What crosses the services as bytes means the same in each of them."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message

from dumont.controller.v1 import inference_service_pb2 as controller
from dumont.model_host.v1 import model_host_service_pb2 as model_host
from dumont.snapshotd.v1 import inference_service_pb2 as snapshotd

# Fields that differ on purpose: each service names the target of a request in its own way, and only the
# controller tells how the model was started.
OWN = {"deployment", "name", "start"}


def fields(message: type[Message]) -> dict[int, tuple[object, ...]]:
    def describe(field: Any) -> tuple[object, ...]:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            return (field.name, "map", *fields(kind._concrete_class).values())
        return (field.name, field.type, kind and kind.full_name, field.is_repeated, field.has_presence)

    return {field.number: describe(field) for field in message.DESCRIPTOR.fields if field.name not in OWN}


@pytest.mark.parametrize("name", ["GenerateRequest", "GenerateResponse", "EmbedRequest", "EmbedResponse"])
def test_the_messages_of_the_three_services_agree_field_by_field(name: str) -> None:
    expected = fields(getattr(controller, name))

    assert fields(getattr(snapshotd, name)) == expected
    assert fields(getattr(model_host, name)) == expected

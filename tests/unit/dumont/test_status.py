"""Errors survive the wire: every class, its reason, and what it carries."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st

from dumont.errors import ERRORS, DumontError, FailedPrecondition, Internal, InvalidArgument, NotFound
from dumont.rpc.status import CLASSES, CODES, from_rpc_error, from_status, to_status


class Call(grpc.RpcError):
    """The error of a call as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, details: str, status: Status | None = None) -> None:
        self._code, self._details, self._status = code, details, status

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        if self._status is None:
            return None
        return (("grpc-status-details-bin", self._status.SerializeToString()),)


def test_the_table_has_one_code_for_each_class_and_one_class_for_each_code() -> None:
    assert set(CODES) == {DumontError, *ERRORS.values()}
    assert len(CLASSES) == len(CODES)
    assert all(code.name == error.code for error, code in CODES.items())


@pytest.mark.parametrize("kind", [DumontError, *ERRORS.values()])
def test_every_class_comes_back_as_itself(kind: type[DumontError]) -> None:
    sent = kind("SOME_REASON", "what and why", metadata={"id": "qa"}, field="a.b", retry_after=0.25)
    received = from_status(to_status(sent, "test.dumont"))
    assert type(received) is kind
    assert vars(received) == vars(sent)


@given(
    message=st.text(max_size=200),
    metadata=st.dictionaries(st.text(max_size=20), st.text(max_size=50), max_size=5),
    field=st.none() | st.text(min_size=1, max_size=20),
    retry_after=st.none() | st.integers(0, 10**12).map(lambda nanoseconds: nanoseconds / 1e9),
)
def test_whatever_it_says_comes_back(
    message: str, metadata: dict[str, str], field: str | None, retry_after: float | None
) -> None:
    sent = NotFound("SOME_REASON", message, metadata=metadata, field=field, retry_after=retry_after)
    received = from_status(to_status(sent, "test.dumont"))
    assert (received.message, received.metadata, received.field) == (message, metadata, field)
    assert received.retry_after == pytest.approx(retry_after, abs=1e-9)


def test_a_subclass_travels_as_the_class_it_refines() -> None:
    class Special(FailedPrecondition):
        pass

    assert type(from_status(to_status(Special("A", "b"), "test.dumont"))) is FailedPrecondition


def test_an_error_too_long_for_the_metadata_is_cut() -> None:
    sent = Internal(
        "LONG", "m" * 100_000, metadata={f"key-{n}": "v" * 10_000 for n in range(100)}, field="f" * 50
    )
    status = to_status(sent, "test.dumont")
    assert status.ByteSize() < 6000
    received = from_status(status)
    assert received.reason == "LONG"
    assert received.message.endswith("…")


def test_details_of_others_are_passed_over() -> None:
    status = Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="none")
    status.details.add().Pack(Status(message="not a detail we know"))
    error = from_status(status)
    assert isinstance(error, NotFound)
    assert (error.reason, error.message) == ("NOT_FOUND", "none")


def test_an_unknown_code_is_still_an_error() -> None:
    assert type(from_status(Status(code=4711, message="?"))) is DumontError


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_an_error_without_details_has_the_codes_name_as_its_reason(code: grpc.StatusCode) -> None:
    error = from_rpc_error(Call(code, "what happened"))
    assert type(error) is CLASSES.get(code, DumontError)
    assert (error.reason, error.message, error.metadata) == (code.name, "what happened", {})


def test_details_that_contradict_the_call_are_not_believed() -> None:
    status = to_status(InvalidArgument("FORGED", "other"), "test.dumont")
    error = from_rpc_error(Call(grpc.StatusCode.NOT_FOUND, "none", status))
    assert isinstance(error, NotFound)
    assert error.reason == "NOT_FOUND"


def test_there_is_exactly_one_error_info() -> None:
    status = to_status(InvalidArgument("A", "b", field="c", retry_after=1), "test.dumont")
    infos = [detail for detail in status.details if detail.Is(ErrorInfo.DESCRIPTOR)]
    assert (len(infos), len(status.details)) == (1, 3)

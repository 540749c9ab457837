"""An endpoint that cannot be one is named as such, before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest

import dumont
from dumont.connection import resolve_endpoint
from dumont.errors import InvalidArgument


@pytest.mark.parametrize(
    "endpoint",
    [
        "localhost:7070",
        "127.0.0.1:1",
        "[::1]:7070",
        "unix:/run/dumont.sock",
        "unix:rel.sock",
        "dns:///c:70",
        "a:7070,b:7071",
        "127.0.0.1:1,[::1]:2",
    ],
)
def test_an_address_is_taken_as_it_is(endpoint: str) -> None:
    assert resolve_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    ("endpoint", "advice"),
    [
        ("http://localhost:7070", "as in localhost:7070"),
        ("https://controller.example/path", "as in controller.example:7070"),
        ("grpc://[::1]", "as in [::1]:7070"),
        ("localhost", "as in localhost:7070"),
        ("[::1]", "as in [::1]:7070"),
        ("::1:7070", "as in [::1]:7070"),
        (":7070", "as in localhost:7070"),
        (",", "names none"),
        ("a:7070,b", "as in b:7070"),
        ("localhost:", "not a port"),
        ("localhost:http", "not a port"),
        ("localhost:0", "not a port"),
        ("localhost:99999", "not a port"),
        ("unix:", "lacks the socket's path"),
        (f"unix:/{'x' * 107}", "at most 107 bytes"),
    ],
)
def test_what_is_no_address_is_refused_with_what_was_meant(endpoint: str, advice: str) -> None:
    for client in (dumont.Client, dumont.AsyncClient):
        with pytest.raises(InvalidArgument) as raised:
            client(endpoint)
        assert (raised.value.reason, raised.value.field) == ("INVALID_ENDPOINT", "endpoint")
        assert advice in raised.value.message


def test_an_endpoint_of_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUMONT_ENDPOINT", "http://localhost:7070")
    with pytest.raises(InvalidArgument, match="URL"):
        resolve_endpoint(None)


@pytest.mark.parametrize("endpoint", [7070, ["localhost"], b"localhost:7070"])
def test_an_endpoint_is_a_string(endpoint: Any) -> None:
    with pytest.raises(InvalidArgument):
        dumont.Client(endpoint)

"""What the S3 adapter makes of a server that fails: repeated where that may help, named where not."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dumont.errors import (
    AlreadyExists,
    DataLoss,
    DumontError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from snapshotd.adapters.object_store import s3
from snapshotd.adapters.object_store.retrying import Retry
from snapshotd.adapters.object_store.s3 import S3Objects, S3Settings
from tests.unit.snapshotd.repository.world import in_a_thread

ATTEMPTS = 3
MOST_PIECES = 2000
SECRET = "a-secret-that-nobody-may-read"


class FaultyServer(ThreadingHTTPServer):
    """Answers each request with the next of its answers, and with the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, str | bytes]] = []
        self.requests: list[str] = []
        self.headers: list[Message] = []
        self.pieces = 0
        self.released = threading.Event()

    def next(self) -> tuple[int, str | bytes]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def answer(self) -> None:
        self.server.requests.append(self.command)
        self.server.headers.append(self.headers)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.server.next()
        if body == "more":
            self.send_more()
            return
        if body == "hang":
            self.server.released.wait(20)
            self.close_connection = True
            return
        if isinstance(body, str):
            body = f"<Error><Code>{body}</Code><Message>{SECRET}</Message></Error>".encode() if body else b""
        cut = body.endswith(b"CUT")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + 1000 * cut))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
        self.send_header("ETag", '"e"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = cut

    def send_more(self) -> None:
        """More than was announced, as long as anybody takes it."""
        self.send_response(200)
        for name, value in {"Content-Length": "10", "Transfer-Encoding": "chunked", "ETag": '"e"'}.items():
            self.send_header(name, value)
        self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(MOST_PIECES):
                self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
                self.server.pieces += 1
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = answer

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def objects(server: FaultyServer, waits: list[float]) -> Iterator[S3Objects]:
    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    settings = S3Settings.from_url(
        "s3://bucket/prefix", f"http://127.0.0.1:{server.server_port}", "access", SECRET
    )
    store = S3Objects(settings, retry=Retry(attempts=ATTEMPTS, sleep=sleep))
    yield store
    store.close()


Call = Callable[[S3Objects], Awaitable[object]]
CALLS: dict[str, Call] = {
    "put": lambda objects: objects.put("chunks/a", b"data"),
    "create": lambda objects: objects.create("snapshots/a/manifest", b"data"),
    "get": lambda objects: objects.get("chunks/a", 100),
    "read": lambda objects: objects.read("chunks/a", 100, bytes, in_a_thread),
}


async def failure(objects: S3Objects, call: str) -> DumontError:
    with pytest.raises(DumontError) as error:
        await CALLS[call](objects)
    # What goes to callers and logs names neither the secret nor the server's own words.
    assert SECRET not in f"{error.value.message} {error.value.metadata}"
    return error.value


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize(
    "fault",
    [
        (500, "InternalError"),
        (503, "SlowDown"),
        (429, "TooManyRequests"),
        # Who answers so is no object store: a load balancer, while the store behind it is away.
        (502, b"<html>bad gateway</html>"),
        (404, b"404 page not found"),
        (403, b"<html>forbidden</html>"),
        (429, b""),
        (408, b""),
    ],
)
async def test_a_fault_that_passes_is_not_noticed(
    server: FaultyServer, objects: S3Objects, waits: list[float], call: str, fault: tuple[int, str | bytes]
) -> None:
    server.answers = [fault, fault, (200, b"data")]
    await CALLS[call](objects)
    assert len(server.requests) == ATTEMPTS
    assert len(waits) == ATTEMPTS - 1
    # Each wait is longer than the one before it, and none is exactly as planned.
    assert 0.05 <= waits[0] <= 0.15
    assert 0.1 <= waits[1] <= 0.3


@pytest.mark.parametrize("call", sorted(CALLS))
async def test_a_fault_that_stays_is_unavailable(server: FaultyServer, objects: S3Objects, call: str) -> None:
    server.answers = [(500, "InternalError")]
    error = await failure(objects, call)
    assert (type(error), error.reason) == (Unavailable, "STORE_UNAVAILABLE")
    assert len(server.requests) == ATTEMPTS


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize(
    "code", ["ExpiredToken", "RequestTimeTooSkewed", "InvalidAccessKeyId", "AccessDenied"]
)
async def test_refused_credentials_are_said_at_once(
    server: FaultyServer, objects: S3Objects, call: str, code: str
) -> None:
    server.answers = [(403, code)]
    error = await failure(objects, call)
    assert (type(error), error.reason) == (Unauthenticated, "STORE_CREDENTIALS_REFUSED")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        ((404, "NoSuchKey"), NotFound, "OBJECT_NOT_FOUND"),
        ((404, "NoSuchBucket"), FailedPrecondition, "STORE_BUCKET_MISSING"),
        ((507, "XMinioStorageFull"), ResourceExhausted, "STORE_FULL"),
        ((400, "EntityTooLarge"), FailedPrecondition, "STORE_REFUSED"),
    ],
)
async def test_what_repeating_cannot_help_is_said_at_once(
    server: FaultyServer,
    objects: S3Objects,
    answer: tuple[int, str],
    kind: type[DumontError],
    reason: str,
) -> None:
    server.answers = [answer]
    error = await failure(objects, "get")
    assert (type(error), error.reason) == (kind, reason)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [409, 412])
async def test_a_lost_creation_is_one_whatever_the_server_calls_it(
    server: FaultyServer, objects: S3Objects, status: int
) -> None:
    server.answers = [(status, "ConditionalRequestConflict" if status == 409 else "PreconditionFailed")]
    assert type(await failure(objects, "create")) is AlreadyExists
    assert len(server.requests) == 1


async def test_an_answer_cut_in_the_middle_is_asked_for_again(
    server: FaultyServer, objects: S3Objects
) -> None:
    server.answers = [(200, b"part CUT"), (200, b"the whole")]
    assert await objects.get("chunks/a", 2000) == b"the whole"


async def test_an_answer_that_is_too_large_is_not_read(server: FaultyServer, objects: S3Objects) -> None:
    server.answers = [(200, bytes(101))]
    assert type(await failure(objects, "get")) is DataLoss
    assert len(server.requests) == 1


@pytest.mark.parametrize("call", ["get", "read"])
async def test_of_an_answer_longer_than_announced_no_more_is_taken(
    server: FaultyServer, objects: S3Objects, call: str
) -> None:
    server.answers = [(200, "more")]
    error = await failure(objects, call)
    assert (type(error), error.reason) == (DataLoss, "OBJECT_TOO_LARGE")
    assert server.pieces < MOST_PIECES / 2


async def test_what_the_environment_says_of_other_clients_does_not_count(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:1"
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "somebody's")
    settings = S3Settings.from_url("s3://bucket", f"http://127.0.0.1:{server.server_port}", "access", SECRET)
    store = S3Objects(settings, retry=Retry(attempts=1))
    server.answers = [(200, b"data")]
    for call in CALLS.values():
        await call(store)
    store.close()
    assert len(server.headers) == len(CALLS)
    for headers in server.headers:
        assert "Authorization" in headers
        assert "x-amz-security-token" not in headers
    assert os.environ["AWS_ENDPOINT_URL_S3"] == nowhere


async def test_a_server_that_hangs_is_left(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "READ_SECONDS", 0.2)
    settings = S3Settings.from_url("s3://bucket", f"http://127.0.0.1:{server.server_port}", "access", SECRET)
    impatient = S3Objects(settings, retry=Retry(attempts=1))
    server.answers = [(200, "hang")]
    for call in sorted(CALLS):
        assert type(await failure(impatient, call)) is Unavailable
    impatient.close()


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    settings = S3Settings.from_url("s3://bucket", "http://127.0.0.1:1", "access", SECRET)
    nowhere = S3Objects(settings, retry=Retry(attempts=1))
    for call in sorted(CALLS):
        assert type(await failure(nowhere, call)) is Unavailable
    nowhere.close()


@pytest.mark.parametrize("url", ["", "s3://", "http://bucket", "bucket", "file:///x"])
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(DumontError):
        S3Settings.from_url(url, "http://127.0.0.1:1", "a", "s")


def test_settings_do_not_show_their_secrets() -> None:
    shown = repr(S3Settings.from_url("s3://bucket/a/b/", "https://host", "the-access-key", SECRET))
    assert SECRET not in shown
    assert "the-access-key" not in shown
    assert "prefix='a/b'" in shown

"""The ObjectStore port over a bucket, by MinIO's SDK and by obstore.

obstore does the conditional writes and the reads. MinIO's SDK has no conditional writes: it silently ignores
the header if it is passed as metadata. And each of its reads holds the interpreter's lock for a millisecond,
for which threads on other cores wait that could unpack chunks.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TypeVar
from xml.etree.ElementTree import ParseError

import certifi
import obstore
import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from obstore import exceptions as obstore_errors
from obstore.store import S3Store

from dumont.errors import (
    AlreadyExists,
    DataLoss,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from snapshotd.adapters.object_store.retrying import Retry
from snapshotd.repository.model import ObjectInfo
from snapshotd.repository.ports import BytesLike, Run

T = TypeVar("T")
Page = list[ObjectInfo]

LIST_PAGE = 1000
CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
# The longest time of a whole read, which goes on as long as bytes arrive.
LONGEST_SECONDS = 3600.0

_REFUSED = {
    "AccessDenied",
    "AccountProblem",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_ABSENT = {"NoSuchKey", "NoSuchObject", "NotFound", "ResourceNotFound"}
_BUSY = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"}
# Statuses that ask for a retry: request timeout, too many requests.
_PASSING = {408, 429}
_PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}

# The status and S3's code in the text of obstore's errors, which do not tell them in any other way.
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")


@dataclass(frozen=True)
class S3Settings:
    """The address of a bucket, and credentials for it.

    Attributes:
        prefix: of all keys, without slashes at its ends; may be empty.
        endpoint: ``http://host:port`` or ``https://host[:port]``.
        ca_file: PEM certificates to trust in addition to the usual ones.
    """

    bucket: str
    prefix: str
    endpoint: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    region: str = "us-east-1"
    ca_file: Path | None = None

    @classmethod
    def from_url(
        cls,
        url: str,
        endpoint: str,
        access_key: str,
        secret_key: str,
        region: str = "us-east-1",
        ca_file: Path | None = None,
    ) -> S3Settings:
        """From ``s3://bucket/prefix``.

        Raises:
            InvalidArgument: the URL or the endpoint has another form.
        """
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not bucket:
            raise InvalidArgument(
                "INVALID_STORE_URL", f"a store must look like s3://BUCKET/PREFIX; got {url!r}"
            )
        if not endpoint.startswith(("http://", "https://")):
            raise InvalidArgument(
                "INVALID_ENDPOINT", f"an S3 endpoint begins with http:// or https://; got {endpoint!r}"
            )
        return cls(bucket, prefix.strip("/"), endpoint.rstrip("/"), access_key, secret_key, region, ca_file)


class S3Objects:
    """The objects of a bucket below a prefix.

    Args:
        connections: calls to the bucket at the same time, apart from :meth:`read`, which its callers limit.
    """

    def __init__(self, settings: S3Settings, connections: int = 8, retry: Retry | None = None) -> None:
        self._settings = settings
        self._prefix = f"{settings.prefix}/" if settings.prefix else ""
        self._retry = retry or Retry()
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="s3")
        secure, host = settings.endpoint.startswith("https://"), settings.endpoint.partition("://")[2]
        self._minio = Minio(
            host,
            access_key=settings.access_key,
            secret_key=settings.secret_key,
            secure=secure,
            region=settings.region,
            http_client=_http_client(settings, connections),
        )
        self._creating = _obstore(settings, READ_SECONDS)
        self._reading = _obstore(settings, LONGEST_SECONDS)

    async def put(self, key: str, data: bytes) -> None:
        def work() -> None:
            # In one part, because the parts of an interrupted multipart upload would stay in the bucket.
            self._minio.put_object(
                self._settings.bucket,
                self._prefix + key,
                io.BytesIO(data),
                len(data),
                part_size=max(len(data), 5 << 20),
            )

        await self._call(key, work)

    async def create(self, key: str, data: bytes) -> None:
        async def attempt() -> None:
            try:
                await obstore.put_async(
                    self._creating, self._prefix + key, data, mode="create", use_multipart=False
                )
            except (obstore_errors.AlreadyExistsError, obstore_errors.PreconditionError):
                raise AlreadyExists("OBJECT_EXISTS", f"{key} exists", metadata={"key": key}) from None
            except (FileNotFoundError, obstore_errors.BaseError) as error:
                raise self._said_by_obstore(error, key) from error

        await self._retry(attempt)

    async def get(self, key: str, limit: int) -> bytes:
        return await self.read(key, limit, bytes, self._in_thread)

    async def read(self, key: str, limit: int, use: Callable[[BytesLike], T], run: Run) -> T:
        return await self._retry(lambda: run(lambda: use(self._read(key, limit))))

    def _read(self, key: str, limit: int) -> memoryview:
        try:
            found = obstore.get(self._reading, self._prefix + key)
            parts, size = [], found.meta["size"]
            if size <= limit:
                size = 0
                # Arrives in one part, unless it is larger than announced.
                for part in found.stream(min_chunk_size=limit + 1):
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        break
        except (FileNotFoundError, obstore_errors.BaseError) as error:
            raise self._said_by_obstore(error, key) from error
        if size > limit:
            raise DataLoss(
                "OBJECT_TOO_LARGE",
                f"{key} has more than the {limit} bytes it may have",
                metadata={"key": key},
            )
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))

    async def stat(self, key: str) -> ObjectInfo | None:
        def work() -> ObjectInfo:
            found = self._minio.stat_object(self._settings.bucket, self._prefix + key)
            assert found.size is not None
            assert found.last_modified is not None
            return ObjectInfo(key, found.size, found.last_modified)

        try:
            return await self._call(key, work)
        except NotFound:
            return None

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        after: str | None = None
        while True:
            # Each page is a call of its own, so that after a failure a page is repeated and not the list.
            page = await self._call(prefix, self._list_page, prefix, after)
            for item in page:
                yield item
            if len(page) < LIST_PAGE:
                return
            after = self._prefix + page[-1].key

    async def delete(self, key: str) -> None:
        await self._call(key, self._minio.remove_object, self._settings.bucket, self._prefix + key)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _list_page(self, prefix: str, after: str | None) -> Page:
        items = self._minio.list_objects(
            self._settings.bucket, self._prefix + prefix, recursive=True, start_after=after
        )
        return [
            ObjectInfo(item.object_name.removeprefix(self._prefix), item.size, item.last_modified)
            for item in islice(items, LIST_PAGE)
            if item.object_name is not None and item.size is not None and item.last_modified is not None
        ]

    async def _call(self, key: str, work: Callable[..., T], *args: object) -> T:
        def classified() -> T:
            try:
                return work(*args)
            except DumontError:
                raise
            # ParseError: the answer is not XML, so it does not come from an object store.
            except (MinioException, urllib3.exceptions.HTTPError, OSError, ParseError) as error:
                raise self._classify(error, key) from error

        return await self._retry(lambda: self._in_thread(classified))

    def _in_thread(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.wrap_future(self._threads.submit(work))

    def _classify(self, error: Exception, key: str) -> DumontError:
        if isinstance(error, S3Error):
            status = error.response.status if error.response is not None else 0
            return self._named(error.code or "", status, key)
        if isinstance(error, InvalidResponseError | ServerError) and "507" in str(error):
            return ResourceExhausted("STORE_FULL", "the store has no room")
        return _unavailable(type(error).__name__)

    def _said_by_obstore(self, error: Exception, key: str) -> DumontError:
        status, code = _STATUS.search(str(error)), _CODE.search(str(error))
        if status is None:
            return _unavailable(type(error).__name__)
        return self._named(code[1] if code else "", int(status[1]), key)

    def _named(self, code: str, status: int, key: str) -> DumontError:
        """The error for a server's answer.

        Args:
            code: S3's code; empty if there is none, so that the answer may come from something else, such as
                a load balancer in front of a store that is away.
            status: HTTP status; 0 if it is not known.
        """
        if code == "NoSuchBucket":
            return self._no_bucket()
        if code in _ABSENT:
            return NotFound("OBJECT_NOT_FOUND", f"there is no {key}", metadata={"key": key})
        if code in _REFUSED or (code and status in (401, 403)):
            return _refused(code)
        if code in _FULL or status == 507:
            return ResourceExhausted("STORE_FULL", f"the store has no room: {code or status}")
        if code and code not in _BUSY and 400 <= status < 500 and status not in _PASSING:
            return FailedPrecondition(
                "STORE_REFUSED", f"the store refused {key}: {code}", metadata={"code": code, "key": key}
            )
        return _unavailable(code or str(status))

    def _no_bucket(self) -> FailedPrecondition:
        return FailedPrecondition(
            "STORE_BUCKET_MISSING",
            f"there is no bucket {self._settings.bucket}; create it",
            metadata={"bucket": self._settings.bucket},
        )


def _http_client(settings: S3Settings, connections: int) -> urllib3.PoolManager:
    client = urllib3.PoolManager(
        maxsize=connections,
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        retries=False,
        cert_reqs="CERT_REQUIRED",
        ca_certs=certifi.where(),
    )
    if settings.ca_file is not None:
        context = urllib3.util.create_urllib3_context()
        context.load_verify_locations(certifi.where())
        context.load_verify_locations(settings.ca_file)
        client.connection_pool_kw["ssl_context"] = context
    return client


def _obstore(settings: S3Settings, seconds: float) -> S3Store:
    """A client whose calls take at most ``seconds``."""
    with _settings_alone():
        return S3Store(
            settings.bucket,
            endpoint=settings.endpoint,
            access_key_id=settings.access_key,
            secret_access_key=settings.secret_key,
            region=settings.region,
            virtual_hosted_style_request=False,
            client_options={
                "allow_http": settings.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "read_timeout": timedelta(seconds=READ_SECONDS),
                "timeout": timedelta(seconds=seconds),
                **({"root_certificate": settings.ca_file.read_bytes()} if settings.ca_file else {}),
            },
            # This adapter does the retries itself.
            retry_config={"max_retries": 0},
        )


@contextlib.contextmanager
def _settings_alone() -> Iterator[None]:
    """Hide variables from which obstore would take another endpoint, a token or a proxy."""
    hidden = {name: value for name, value in os.environ.items() if _is_read_by_obstore(name.upper())}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_read_by_obstore(name: str) -> bool:
    return name.startswith("AWS_") or name in _PROXIES


def _refused(code: str) -> Unauthenticated:
    return Unauthenticated(
        "STORE_CREDENTIALS_REFUSED",
        f"the store refused the credentials ({code}); check the keys, their rights and this machine's clock",
        metadata={"code": code},
    )


def _unavailable(code: str) -> Unavailable:
    # The text of a client's error may contain URLs with signatures, so only its type is reported.
    return Unavailable("STORE_UNAVAILABLE", f"the store does not answer ({code})", metadata={"code": code})

"""A real S3 server on loopback: SeaweedFS, from its wheel."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3
from minio import Minio

BUCKET = "dumont"
ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
START_SECONDS = 60
# The ports for their own talk are chosen too, else they are the others plus 10000.
PARTS = ("s3", "master", "volume", "filer", "admin")


@dataclass(frozen=True)
class S3Server:
    """Where it listens and how to reach its bucket."""

    endpoint: str
    pid: int
    secure_endpoint: str = ""
    bucket: str = BUCKET
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    def environment(self) -> dict[str, str]:
        """The variables that the services read."""
        return {
            "S3_ENDPOINT": self.endpoint,
            "S3_ACCESS_KEY": self.access_key,
            "S3_SECRET_KEY": self.secret_key,
        }


@dataclass(frozen=True)
class S3Ports:
    """Where a server and its parts listen, so that one that was killed can be started again."""

    parts: Mapping[str, int]
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    @classmethod
    def pick(cls, free_port: Callable[[], int]) -> S3Ports:
        names = [f"{part}.port{of}" for part in PARTS for of in ("", ".grpc")]
        return cls({name: free_port() for name in names})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.parts['s3.port']}"


def server_command(binary: Path, folder: Path, ports: S3Ports) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a server with one bucket; its data lies in ``folder``."""
    command = [
        str(binary), "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-s3.autoCreateBucket=false", f"-bucket={BUCKET}",
        *(f"-{name}={port}" for name, port in ports.parts.items()),
    ]  # fmt: skip
    environment = {
        "HOME": str(folder),
        "PATH": os.environ.get("PATH", ""),
        "AWS_ACCESS_KEY_ID": ports.access_key,
        "AWS_SECRET_ACCESS_KEY": ports.secret_key,
    }
    return command, environment


@contextmanager
def s3_server(
    binary: Path, folder: Path, free_port: Callable[[], int], certificate: tuple[Path, Path] | None = None
) -> Iterator[S3Server]:
    """Run a server with one empty bucket; its data lies in ``folder``. It ends with the context.

    Args:
        certificate: PEM files of a certificate and its key; with them it is reached by TLS too.
    """
    ports = S3Ports.pick(free_port)
    command, environment = server_command(binary, folder, ports)
    secure = 0
    if certificate is not None:
        secure = free_port()
        chain, key = certificate
        command += [f"-s3.port.https={secure}", f"-s3.cert.file={chain}", f"-s3.key.file={key}"]
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=folder)
    try:
        _wait(process, ports.parts["s3.port"], log)
        secure_endpoint = f"https://127.0.0.1:{secure}" if secure else ""
        yield S3Server(ports.endpoint, process.pid, secure_endpoint)
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return once the bucket takes an object and gives it back."""
    client = Minio(
        f"127.0.0.1:{port}",
        ACCESS_KEY,
        SECRET_KEY,
        secure=False,
        region="us-east-1",
        http_client=urllib3.PoolManager(retries=False, timeout=5),
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if client.bucket_exists(BUCKET):
                return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}") from error
        time.sleep(0.1)

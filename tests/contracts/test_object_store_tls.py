"""A bucket behind TLS is reached with its own CA, and with nothing less."""

from __future__ import annotations

import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dumont.errors import DumontError, Unavailable
from snapshotd.adapters.object_store.retrying import Retry
from snapshotd.adapters.object_store.s3 import S3Objects, S3Settings
from snapshotd.config import Settings
from snapshotd.object_store import check
from tests.contracts.test_object_store_faults import FaultyServer
from tests.helpers.s3_server import S3Server, s3_server


def issue(
    name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate for loopback; its own issuer when none is given."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
    )
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256()), key


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    return tmp_path / "ca.pem"


def certify(folder: Path, ca_file: Path) -> tuple[Path, Path]:
    """Files of a server's certificate and of its key; ``ca_file`` is made to hold its authority."""
    authority = issue("a test's authority", None)
    certificate, key = issue("a test's bucket", authority)
    ca_file.write_bytes(authority[0].public_bytes(serialization.Encoding.PEM))
    chain, private = folder / "server.pem", folder / "server.key"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return chain, private


@pytest.fixture
def server(tmp_path: Path, ca_file: Path) -> Iterator[FaultyServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certify(tmp_path, ca_file))
    with FaultyServer() as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        running.answers = [(200, b"data")]
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def objects(server: FaultyServer, ca_file: Path | None) -> S3Objects:
    endpoint = f"https://127.0.0.1:{server.server_port}"
    settings = S3Settings.from_url("s3://bucket", endpoint, "access", "secret", ca_file=ca_file)
    return S3Objects(settings, retry=Retry(attempts=1))


async def test_its_own_authority_is_enough(server: FaultyServer, ca_file: Path) -> None:
    store = objects(server, ca_file)
    await store.put("a", b"data")
    await store.create("a", b"data")
    assert await store.get("a", 10) == b"data"
    store.close()


async def test_without_it_nothing_is_sent(server: FaultyServer) -> None:
    store = objects(server, None)
    for call in (store.put("a", b"data"), store.create("a", b"data"), store.get("a", 10)):
        with pytest.raises(DumontError) as refusal:
            await call
        assert type(refusal.value) is Unavailable
    assert server.requests == []
    store.close()


@pytest.fixture
def real_server(
    tmp_path: Path, ca_file: Path, weed: Path, free_port: Callable[[], int]
) -> Iterator[S3Server]:
    """SeaweedFS with a certificate of the test's authority."""
    files = certify(tmp_path, ca_file)
    (tmp_path / "data").mkdir()
    with s3_server(weed, tmp_path / "data", free_port, files) as running:
        yield running


async def test_a_real_server_is_used_with_the_authority_of_the_settings_alone(
    real_server: S3Server, ca_file: Path
) -> None:
    def settings(ca: Path | None) -> Settings:
        return Settings.model_validate(
            {
                "store_url": "s3://dumont/tls",
                "s3_endpoint": real_server.secure_endpoint,
                "s3_access_key": real_server.access_key,
                "s3_secret_key": real_server.secret_key,
                "s3_ca_file": ca,
            }
        )

    (trusting,), (refusing,) = await check(settings(ca_file)), await check(settings(None))
    assert trusting["passed"], trusting["message"]
    assert not refusing["passed"]
    assert "STORE_UNAVAILABLE" in str(refusing["message"])

"""A bucket behind TLS is reached with its own CA, and with nothing less."""

from __future__ import annotations

import ipaddress
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dumont.errors import DumontError, Unavailable
from snapshotd.adapters.retrying import Retry
from snapshotd.adapters.s3_objects import S3Objects, S3Settings
from tests.contracts.test_object_store_faults import FaultyServer


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


@pytest.fixture
def server(tmp_path: Path, ca_file: Path) -> Iterator[FaultyServer]:
    authority = issue("a test's authority", None)
    certificate, key = issue("a test's bucket", authority)
    ca_file.write_bytes(authority[0].public_bytes(serialization.Encoding.PEM))
    chain = tmp_path / "server.pem"
    chain.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
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

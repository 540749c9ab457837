"""Where a server listens: ports and sockets are its own, and others reach it only as was meant."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from dumont.errors import FailedPrecondition, InvalidArgument
from dumont.rpc.server import bind, new_server


@pytest.fixture
async def taken() -> AsyncIterator[str]:
    """An address where a server listens."""
    server = new_server("test.dumont")
    address = bind(server, "127.0.0.1:0")
    await server.start()
    yield address
    await server.stop(0)


async def test_a_taken_port_is_refused(taken: str) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        bind(new_server("other.dumont"), taken)
    assert raised.value.reason == "ADDRESS_IN_USE"
    assert raised.value.metadata == {"address": taken}


async def test_a_port_taken_on_127_0_0_1_is_taken_on_localhost(taken: str) -> None:
    port = taken.rpartition(":")[2]
    with pytest.raises(FailedPrecondition, match="another process listens"):
        bind(new_server("other.dumont"), f"localhost:{port}")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.invalid:0"])
async def test_plain_text_is_refused_where_others_can_reach_it(address: str) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        bind(new_server("test.dumont"), address)
    assert raised.value.reason == "PLAINTEXT_REFUSED"


async def test_plain_text_can_be_allowed() -> None:
    server = new_server("test.dumont")
    address = bind(server, "0.0.0.0:0", insecure_ok=True)
    await server.stop(0)
    assert int(address.removeprefix("0.0.0.0:")) > 0


async def test_an_address_of_another_machine_cannot_be_used() -> None:
    with pytest.raises(FailedPrecondition) as raised:
        bind(new_server("test.dumont"), "192.0.2.1:0", insecure_ok=True)
    assert raised.value.reason == "ADDRESS_UNUSABLE"


@pytest.mark.parametrize(
    "address", ["", "7070", ":7070", "127.0.0.1:", "127.0.0.1:-1", "127.0.0.1:70000", "unix:"]
)
async def test_a_malformed_address_is_named(address: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        bind(new_server("test.dumont"), address)
    assert (raised.value.reason, raised.value.field) == ("INVALID_ADDRESS", "address")


async def test_a_unix_socket_is_its_owners_only(tmp_path: Path) -> None:
    server = new_server("test.dumont")
    path = tmp_path / "host.sock"
    address = bind(server, f"unix:{path}")
    await server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)
        assert channel.get_state() is grpc.ChannelConnectivity.READY
    with pytest.raises(FailedPrecondition) as raised:
        bind(new_server("other.dumont"), address)
    assert raised.value.reason == "ADDRESS_IN_USE"
    await server.stop(0)


async def test_a_unix_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "host.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    server = new_server("test.dumont")
    address = bind(server, f"unix:{path}")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)
        assert channel.get_state() is grpc.ChannelConnectivity.READY
    await server.stop(0)


async def test_a_unix_socket_needs_its_directory(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        bind(new_server("test.dumont"), f"unix:{tmp_path}/none/host.sock")
    assert raised.value.reason == "ADDRESS_UNUSABLE"


async def test_a_unix_path_the_kernel_would_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="107 bytes"):
        bind(new_server("test.dumont"), f"unix:{tmp_path}/{'x' * 108}")

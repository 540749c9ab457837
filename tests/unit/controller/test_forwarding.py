"""Connections to the other controllers."""

from __future__ import annotations

import asyncio

from controller.ports import Members
from controller.service.forwarding import Peers


async def test_several_calls_may_drop_the_connections_to_those_that_are_gone() -> None:
    peers = Peers()
    for port in (1, 2, 3):
        peers.channel(f"127.0.0.1:{port}")

    await asyncio.gather(*(peers.keep(Members()) for _ in range(3)))

    await peers.close()

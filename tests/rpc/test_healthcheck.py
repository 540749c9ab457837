"""deploy/healthcheck, which tells a container's engine whether the service in it serves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from dumont.rpc.server import ServerLimits, add_standard_services, new_server

HEALTHCHECK = Path(__file__).parents[2] / "deploy" / "healthcheck"


async def check(address: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, HEALTHCHECK, address, stderr=subprocess.PIPE
    )
    _, said = await process.communicate()
    return process.returncode, said.decode()


async def test_it_tells_who_serves_from_who_does_not(free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{free_port()}"
    status, said = await check(address)
    assert status == 1
    assert f"{address} does not answer" in said

    server = new_server("test.dumont", ServerLimits())
    health = add_standard_services(server, ("some.Service",))
    server.add_insecure_port(address)
    await server.start()
    try:
        status, said = await check(address)
        assert (status, said) == (1, f"{address} answers, and does not serve now\n")

        await health.set_all(True)
        assert await check(address) == (0, "")
    finally:
        await server.stop(None)

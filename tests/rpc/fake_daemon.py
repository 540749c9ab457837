"""A service as ``dumont up`` starts it: serves health and one node, or fails as it is told."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from dumont.controller.v1 import node_service_pb2_grpc
from dumont.rpc.server import add_standard_services, bind, new_server, run_until_signalled
from tests.rpc.fake_controller import FakeController


async def serve(address: str, left: Path) -> None:
    server = new_server("fake.dumont")
    node_service_pb2_grpc.add_NodeServiceServicer_to_server(FakeController(), server)
    health = add_standard_services(server, [])
    bind(server, address)
    await server.start()
    await health.set_all(True)
    await run_until_signalled(server, health, 1)
    left.write_text("drained")


if __name__ == "__main__":
    if sys.argv[1] == "fail":
        sys.stderr.write("starting\nthe machine is unfit\n")
        sys.exit(3)
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2])))

"""The agent's process: ``python -m snapshotd.cuda.agent``, JSON objects one a line on stdin and stdout.

``{"id": 1, "do": "lock", "pid": 42, "timeout_ms": 5000}`` is answered by ``{"id": 1, "ok": ...}`` or
``{"id": 1, "error": "..."}``, in the order in which the operations end. It has no CUDA context, so it
holds no GPU memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from snapshotd.cuda.json_output import Message, claim_stdout

# Operations of different processes run beside each other.
THREADS = 8


def commands(process: Callable[[int], Any]) -> dict[str, Callable[[Message], Any]]:
    """What can be asked, over ``cuda.core.checkpoint.Process`` or something like it."""
    return {
        "state": lambda message: process(message["pid"]).state,
        "lock": lambda message: process(message["pid"]).lock(message["timeout_ms"]),
        "checkpoint": lambda message: process(message["pid"]).checkpoint(),
        "restore": lambda message: process(message["pid"]).restore(_bare(message.get("devices") or {})),
        "unlock": lambda message: process(message["pid"]).unlock(),
    }


def _bare(devices: Mapping[str, str]) -> dict[str, str] | None:
    """A device map as cuda-core takes it: NVML and the command line tool write ``GPU-`` before a UUID."""
    return {old.removeprefix("GPU-"): new.removeprefix("GPU-") for old, new in devices.items()} or None


def serve(process: Callable[[int], Any]) -> None:
    """Answer until stdin ends."""
    known = commands(process)
    send = claim_stdout()

    def answer(message: Message) -> None:
        reply: Message = {"id": message["id"]}
        try:
            reply["ok"] = known[message["do"]](message)
        except Exception as error:
            reply["error"] = f"{type(error).__name__}: {error}"
        send(reply)

    send({"ready": True})
    with ThreadPoolExecutor(THREADS) as pool:
        for line in sys.stdin:
            pool.submit(answer, json.loads(line))


def main() -> None:
    from cuda.bindings import driver
    from cuda.core.checkpoint import Process

    (result,) = driver.cuInit(0)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise SystemExit(f"the CUDA driver cannot be used: {result.name}")
    serve(Process)


if __name__ == "__main__":
    main()

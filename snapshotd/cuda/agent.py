"""The agent's process: ``python -m snapshotd.cuda.agent``, with JSON lines on stdin and stdout.

``{"id": 1, "do": "lock", "pid": 42, "timeout_ms": 5000}`` is answered by ``{"id": 1, "ok": ...}`` or
``{"id": 1, "error": "..."}``, in the order in which the operations end. The agent has no CUDA context, so it
takes no GPU memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from snapshotd.cuda.json_output import Message, claim_stdout

# Operations on different processes run at the same time.
THREADS = 8


def commands(process: Callable[[int], Any]) -> dict[str, Callable[[Message], Any]]:
    """The operations by name, over ``cuda.core.checkpoint.Process`` or a class like it."""
    return {
        "state": lambda message: process(message["pid"]).state,
        "lock": lambda message: process(message["pid"]).lock(message["timeout_ms"]),
        "checkpoint": lambda message: process(message["pid"]).checkpoint(),
        "restore": lambda message: process(message["pid"]).restore(_bare(message.get("devices") or {})),
        "unlock": lambda message: process(message["pid"]).unlock(),
    }


def _bare(devices: Mapping[str, str]) -> dict[str, str] | None:
    """A device map as cuda-core takes it, without the ``GPU-`` that NVML writes before a UUID."""
    return {old.removeprefix("GPU-"): new.removeprefix("GPU-") for old, new in devices.items()} or None


def serve(process: Callable[[int], Any]) -> None:
    """Answer requests until stdin ends."""
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
    """The command of the process."""
    from cuda.bindings import driver
    from cuda.core.checkpoint import Process

    (result,) = driver.cuInit(0)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise SystemExit(f"the CUDA driver cannot be used: {result.name}")
    serve(Process)


if __name__ == "__main__":
    main()

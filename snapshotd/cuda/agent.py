"""The agent's process: ``python -m snapshotd.cuda.agent``, JSON objects one a line on stdin and stdout.

``{"id": 1, "do": "lock", "pid": 42, "timeout_ms": 5000}`` is answered by ``{"id": 1, "ok": ...}`` or
``{"id": 1, "error": "..."}``, in the order in which the operations end. It has no CUDA context, so it
holds no GPU memory.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Message = dict[str, Any]
# Operations of different processes run beside each other.
THREADS = 8


def commands(process: Callable[[int], Any]) -> dict[str, Callable[[Message], Any]]:
    """What can be asked, over ``cuda.core.checkpoint.Process`` or something like it."""
    return {
        "state": lambda message: process(message["pid"]).state,
        "lock": lambda message: process(message["pid"]).lock(message["timeout_ms"]),
        "checkpoint": lambda message: process(message["pid"]).checkpoint(),
        "restore": lambda message: process(message["pid"]).restore(message.get("devices") or None),
        "unlock": lambda message: process(message["pid"]).unlock(),
    }


def main() -> None:
    from cuda.bindings import driver
    from cuda.core.checkpoint import Process

    (result,) = driver.cuInit(0)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise SystemExit(f"the CUDA driver cannot be used: {result.name}")
    known = commands(Process)
    speak = threading.Lock()

    def answer(message: Message) -> None:
        reply: Message = {"id": message["id"]}
        try:
            reply["ok"] = known[message["do"]](message)
        except Exception as error:
            reply["error"] = f"{type(error).__name__}: {error}"
        with speak:
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()

    sys.stdout.write(json.dumps({"ready": True}) + "\n")
    sys.stdout.flush()
    with ThreadPoolExecutor(THREADS) as pool:
        for line in sys.stdin:
            pool.submit(answer, json.loads(line))


if __name__ == "__main__":
    main()

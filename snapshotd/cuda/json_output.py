"""JSON lines on standard output, for child processes of snapshotd."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


def claim_stdout() -> Callable[[Message], None]:
    """Reserve standard output for messages. From now on, what libraries print goes to standard error.

    Returns:
        Sends one message; any thread may call it.
    """
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    speak = threading.Lock()

    def send(message: Message) -> None:
        with speak:
            output.write(json.dumps(message) + "\n")
            output.flush()

    return send

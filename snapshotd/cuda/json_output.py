"""Standard output as a line of JSON each, for processes that snapshotd talks with."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


def claim_stdout() -> Callable[[Message], None]:
    """Keep standard output for messages: whatever a library prints goes to standard error from here on.

    Returns:
        Says one message; any thread may call it.
    """
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    speak = threading.Lock()

    def send(message: Message) -> None:
        with speak:
            output.write(json.dumps(message) + "\n")
            output.flush()

    return send

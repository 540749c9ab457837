"""JSON lines over a descriptor: the protocol between the shim, the daemon and the model host."""

from __future__ import annotations

import json
import os
from typing import Any

Message = dict[str, Any]


class JsonLines:
    """A connection on which each message is a JSON object on a line."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.buffer = b""

    def receive(self) -> list[Message] | None:
        """The complete messages that have arrived; None at the end of file."""
        try:
            data = os.read(self.fd, 1 << 20)
        except ConnectionError:
            return None
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, message: Message) -> None:
        """Send a message, and block until all of it is written."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.fd, data) :]

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)

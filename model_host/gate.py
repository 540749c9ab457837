"""Counts running calls, refuses new ones while draining, remembers whether anyone ever came."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dumont.errors import Unavailable


class Gate:
    """Calls pass through here; the host's life cycle opens and closes it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._open = False
        self._served = False

    @property
    def inside(self) -> int:
        """Calls admitted and not yet finished."""
        return self._inside

    @property
    def served(self) -> bool:
        """Whether a caller's prompt ever entered this process: then no snapshot of it may be shared."""
        return self._served

    @property
    def open(self) -> bool:
        return self._open

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Hold a place while a call runs.

        Raises:
            Unavailable: INSTANCE_DRAINING, the gate is closed.
        """
        with self._changed:
            self._served = True  # also when refused: its bytes are in this memory
            if not self._open:
                raise Unavailable(
                    "INSTANCE_DRAINING",
                    "This instance is about to stop or be captured and takes no new calls; call again.",
                    retry_after=1.0,
                )
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def set_open(self, value: bool) -> None:
        """Admit calls, or refuse new ones; running ones go on."""
        with self._changed:
            self._open = value

    def wait_empty(self, timeout: float) -> bool:
        """Wait until no call is inside, for at most ``timeout`` seconds; whether that came true."""
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == 0, timeout)

"""How the services log: one JSON object per line, or columns for a person."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Literal, TextIO, cast

import structlog


class LossyStream:
    """A text stream whose writes may be lost, but never raise.

    What is logged about goes on: a full disk or a closed pipe below the log must not end it halfway.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write, and ignore that it fails."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        """Flush, and ignore that it fails."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def configure_logs(format: Literal["json", "console"], level: str = "info") -> None:
    """Send logs to standard error.

    Args:
        format: ``json`` for machines, ``console`` for a terminal.
        level: the least severe that is shown, as ``logging`` names it.
    """
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer() if format == "json" else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, LossyStream(sys.stderr))),
    )

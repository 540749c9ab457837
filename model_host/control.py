"""The control pipes: one JSON message a line, in on one descriptor, out on another.

Plain blocking reads, so that a quiet host sits in one ``read`` and nothing else: that is where it is frozen,
and where it wakes up with fresh pipes under the same descriptors.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from dumont.errors import DumontError, Internal, InvalidArgument

log = logging.getLogger(__name__)

Json = dict[str, Any]
READ_BYTES: Final = 64 * 1024
MAX_LINE_BYTES: Final = 1024 * 1024


def loop(control_in: int, control_out: int, run: Callable[[str, Json], Json]) -> None:
    """Answer commands until ``stop`` or the end of ``control_in``.

    Args:
        control_in: descriptor to read messages from.
        control_out: descriptor to write answers to.
        run: runs one command with its arguments and returns the answer.
    """
    for line in _lines(control_in):
        answer, last = _answer(line, run)
        try:
            _write(control_out, answer)
        except BrokenPipeError:
            return  # nobody is left to answer to
        if last:
            return


def _answer(line: bytes | None, run: Callable[[str, Json], Json]) -> tuple[Json, bool]:
    """The answer to one message, and whether it is the last."""
    identity: object = None
    try:
        message = _parse(line)
        identity = message.pop("id", None)
        command = message.pop("do", None)
        if not isinstance(command, str):
            raise InvalidArgument("BAD_CONTROL_MESSAGE", "do must name a command", field="do")
        return {"id": identity, "ok": run(command, message)}, command == "stop"
    except DumontError as error:
        failure = error
    except Exception as error:
        log.exception("a control command failed")
        failure = Internal(
            "HOST_FAILED", f"the command failed with {type(error).__name__}; the host's log has the rest"
        )
    return {"id": identity, "error": _describe(failure)}, False


def _describe(error: DumontError) -> Json:
    described: Json = {"reason": error.reason, "message": error.message, "code": error.code}
    if error.field:
        described["field"] = error.field
    if error.metadata:
        described["metadata"] = error.metadata
    return described


def _parse(line: bytes | None) -> Json:
    if line is None:
        raise InvalidArgument("BAD_CONTROL_MESSAGE", f"a message is at most {MAX_LINE_BYTES} bytes")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("BAD_CONTROL_MESSAGE", f"a message must be JSON: {error}") from error
    if not isinstance(message, dict):
        raise InvalidArgument("BAD_CONTROL_MESSAGE", "a message must be a JSON object")
    return message


def _lines(descriptor: int) -> Iterator[bytes | None]:
    """Every line that is not empty; None for one that was too long."""
    pending = b""
    too_long = False
    while data := os.read(descriptor, READ_BYTES):
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            if too_long or len(line) > MAX_LINE_BYTES:
                too_long = False
                yield None
            elif line.strip():
                yield line
        if len(pending) > MAX_LINE_BYTES:
            too_long, pending = True, b""


def _write(descriptor: int, answer: Json) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]

"""The loader's process: ``python -m snapshotd.cuda.loader --socket PATH --files DIRECTORY``.

It keeps weight files registered with the GPUs, and carries out orders, one for each connection. An order is a
line of JSON, ``{"gpu": UUID, "size": bytes, "pieces": [[file, offset, bytes, place], ...]}``. Once everything
is on that GPU, it is answered by a descriptor of the memory, which belongs to the sender from then on. Any
other answer is an error message. Closing the connection cancels the order.

The loader speaks with snapshotd in JSON lines on stdin and stdout. ``{"id": 1, "left": true}`` says that
files have been evicted, and is answered by ``{"id": 1, "ok": true}`` once their memory is free. ``{"id": 2,
"register": NAME}`` names a new file. ``{"id": 2, "error": "..."}`` says what went wrong.

Registered memory is copied at the speed of the bus (54 GB/s on an H100), but registering 15 GB takes 0.4 s,
too long for a restore. So it is done once, in advance, by a process that stays. The files must lie in a
tmpfs. After a lasting error of the driver the process ends, and snapshotd starts another.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from snapshotd.cuda.driver import DriverError, LoaderError
from snapshotd.cuda.gpus import Gpus
from snapshotd.cuda.json_output import Message, claim_stdout
from snapshotd.cuda.registered import Files, Registered, StillRegistered

Piece = tuple[str, int, int, int]

# The longest line of an order; a model of a thousand shards with a thousand tensors each needs less.
LONGEST_ORDER = 64 << 20
ANSWER = b"{}"


class Unwanted(Exception):
    """The sender of the order has closed the connection."""


@dataclass(frozen=True)
class Loader:
    """Carries out orders, and the messages of snapshotd.

    Args:
        give_up: ends the process, for a given reason.
    """

    gpus: Gpus
    files: Files
    give_up: Callable[[str], None]

    def serve(self, connection: socket.socket) -> None:
        """Carry out the order of one connection."""
        with connection:
            try:
                descriptor = self._load(connection)
            except Unwanted:
                return
            except (LoaderError, StillRegistered, ValueError, KeyError, TypeError, OSError) as error:
                reply(connection, said(error).encode(), [])
                self._end_after(error)
                return
            try:
                reply(connection, ANSWER, [descriptor])
            finally:
                os.close(descriptor)

    def answer(self, message: Message) -> Message:
        """Do what a message of snapshotd asks for, and return the answer."""
        reply: Message = {"id": message["id"]}
        try:
            if "register" in message:
                self.gpus.open_all()
                self.files.register(message["register"])
            else:
                self.gpus.enter_any()
                self.files.forget()
            reply["ok"] = True
        except (LoaderError, StillRegistered, ValueError, OSError) as error:
            reply["error"] = said(error)
            self._end_after(error)
        return reply

    def _load(self, connection: socket.socket) -> int:
        with connection.makefile("rb") as lines:
            order = json.loads(lines.readline(LONGEST_ORDER))
        gpu = self.gpus.get(order["gpu"])
        with self.files.use(path for path, *_ in order["pieces"]) as files:
            pieces = locate(files, order["pieces"], order["size"])
            return gpu.load(order["size"], pieces, lambda: check_wanted(connection))

    def _end_after(self, error: Exception) -> None:
        if isinstance(error, StillRegistered) or (isinstance(error, DriverError) and error.lasting):
            self.give_up(str(error))


def said(error: Exception) -> str:
    """The text of an error, or its type if it has none."""
    return str(error) or type(error).__name__


def check_wanted(connection: socket.socket) -> None:
    """Check that the sender of an order still waits for it.

    Raises:
        Unwanted: the other end has closed the connection.
    """
    try:
        gone = not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    except OSError:
        gone = True
    if gone:
        raise Unwanted


def locate(files: Mapping[str, Registered], pieces: Sequence[Piece], size: int) -> list[tuple[int, int, int]]:
    """Find each piece in registered memory, and check it against its file and its destination.

    Raises:
        LoaderError: a piece does not fit.
    """
    found = []
    for path, offset, length, place in pieces:
        registered = files[path]
        if not (0 <= offset <= offset + length <= len(registered.mapping) and 0 <= place <= size - length):
            raise LoaderError(f"{length} bytes at {offset} of {Path(path).name} do not fit at {place}")
        found.append((registered.address + offset, length, place))
    return found


def reply(connection: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """Send an answer with descriptors."""
    try:
        socket.send_fds(connection, [data], descriptors)
    except OSError as error:
        # The sender is gone. Closing the descriptor frees the memory.
        sys.stderr.write(f"an order was not taken: {error}\n")


def listen(path: Path) -> socket.socket:
    """Listen on a socket at ``path``, in place of one that an earlier loader left."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Relative, because a socket's path may have 107 bytes and a state directory may be deep.
    os.chdir(path.parent)
    Path(path.name).unlink(missing_ok=True)
    listener.bind(path.name)
    Path(path.name).chmod(0o600)
    listener.listen()
    return listener


def end(reason: str) -> NoReturn:
    """End the process, from any thread, and free everything that it holds."""
    sys.stderr.write(f"the weight loader ends: {reason}\n")
    sys.stderr.flush()
    os._exit(1)


def converse(loader: Loader, lines: Iterable[str], send: Callable[[Message], None]) -> None:
    """Answer snapshotd's messages until ``lines`` end.

    Evicted files are released while others are being registered, which takes long.
    """
    registering, forgetting = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    for line in lines:
        message = json.loads(line)
        worker = registering if "register" in message else forgetting
        worker.submit(lambda message: send(loader.answer(message)), message)


def accept(listener: socket.socket, loader: Loader) -> None:
    """Carry out the order of every connection in a thread of its own."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=loader.serve, args=(connection,), daemon=True).start()


def run(driver: Any) -> None:
    """Serve until stdin ends, that is, until snapshotd ends.

    Args:
        driver: the CUDA driver's bindings.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True, help="directory of the node's weight files")
    arguments = parser.parse_args()
    send = claim_stdout()
    try:
        loader = Loader(Gpus(driver), Files(arguments.files, driver), end)
    except DriverError as error:
        raise SystemExit(f"the CUDA driver cannot be used: {error}") from None
    listener = listen(arguments.socket)
    threading.Thread(target=accept, args=(listener, loader), daemon=True).start()
    send({"ready": True})
    converse(loader, sys.stdin, send)
    # Nobody waits for the orders that still run.
    os._exit(0)


def main() -> None:
    """The command of the process."""
    from cuda.bindings import driver

    run(driver)


if __name__ == "__main__":
    main()

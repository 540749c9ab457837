"""The shim's process: ``python -m snapshotd.shim.main --socket NAME --criu PATH --pycriu DIR``.

It prepares everything that a start or a restore would otherwise wait for (a mount namespace, pipes, a waiting
CRIU) and then listens on its socket. Each message is one JSON object on a line:

- ``{"id": 1, "do": "launch", ...}`` answered by ``{"id": 1, "ok": {...}}`` or ``{"id": 1, "error": ...}``;
- ``do: host`` passes its ``message`` to the model host, whose answer comes back the same way;
- ``{"event": "exited", "status": 256, "said": "…"}`` reports the end of the model host: its wait status and
  the last line of its log.

snapshotd may disconnect and connect again at any time. ``do: status`` tells a new one what is here.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
from pathlib import Path

from snapshotd.shim.shim import Shim
from snapshotd.system import criu_bindings, linux, mounts


def main() -> None:
    """The command of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--socket", type=Path, required=True, help="where to listen; made when everything is ready"
    )
    parser.add_argument("--criu", type=Path, required=True)
    parser.add_argument("--pycriu", type=Path, help="directory of pycriu; left out: the usual path")
    parser.add_argument("--weights", type=Path, help="the node's weight cache; left out: it has none")
    parser.add_argument("--engine", action="append", default=[], help="NAME=DIRECTORY of its environment")
    parser.add_argument("--memory", type=int, default=0, help="bytes that it may take; 0: no limit")
    parser.add_argument("--daemon", type=int, required=True, help="pid of the snapshotd that starts it")
    arguments = parser.parse_args()
    # If the daemon dies before it connects, nobody knows this process, so it must end too.
    linux.end_with_parent(signal.SIGKILL)
    if os.getppid() != arguments.daemon:
        raise SystemExit("the snapshotd that started this is gone")
    pycriu = criu_bindings.load("pycriu", arguments.pycriu)
    linux.become_subreaper()
    mounts.make_private()
    folder, name = arguments.socket.parent.resolve(), arguments.socket.name
    scratch = folder / f"{name}.root"
    scratch.mkdir(mode=0o700, exist_ok=True)
    engines = {name: Path(place) for name, _, place in (text.partition("=") for text in arguments.engine)}
    shim = Shim(scratch, arguments.criu, pycriu, arguments.weights, arguments.memory, engines)
    # Relative, because a socket's path may have 107 bytes and a state directory may be deep.
    os.chdir(folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.umask(0o077)
    # The socket gets its name once it listens, so that whoever sees the name can connect.
    listener.bind(f".{name}")
    listener.listen()
    Path(f".{name}").rename(name)
    try:
        shim.serve(listener)
    finally:
        (folder / name).unlink(missing_ok=True)
        linux.unmount(scratch)
        scratch.rmdir()
    # The log of this process's standard error, which stays if the process ends in any other way.
    (folder / name).with_suffix(".log").unlink(missing_ok=True)


if __name__ == "__main__":
    main()

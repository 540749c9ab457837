"""A model host and the commands and events that concern it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from snapshotd.shim import criu, namespaces
from snapshotd.shim.dumper import Dumper
from snapshotd.shim.hostlog import HostLog
from snapshotd.shim.json_lines import JsonLines, Message
from snapshotd.system import linux, mounts
from snapshotd.system.freezer import Freezer
from snapshotd.system.memory_limit import MemoryLimit


class CommandRefused(Exception):
    """The command does not fit the state of the shim."""


class OriginGone(CommandRefused):
    """The snapshot from which most of the model host's memory is mapped has been deleted."""


class Shim:
    """A model host, and the connections to it and to snapshotd.

    Args:
        scratch: a directory for the model host's root.
        criu_binary: the CRIU program.
        pycriu: the package.
        weights: the node's weight cache; None if it has none.
        engines: the environments of the node's engines by name.
        memory_bytes: memory that the model host may take; 0 for no limit.
    """

    def __init__(
        self,
        scratch: Path,
        criu_binary: Path,
        pycriu: Any,
        weights: Path | None,
        memory_bytes: int = 0,
        engines: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.memory_bytes = memory_bytes
        self.pycriu = pycriu
        self.dumper = Dumper(criu_binary, pycriu)
        self.selector = selectors.DefaultSelector()
        self.client: JsonLines | None = None
        self.host: JsonLines | None = None
        self.instance = ""
        self.pid = 0
        self.exit_status: int | None = None
        self.frozen = False
        self.freezer: Freezer | None = None
        self.memory: MemoryLimit | None = None
        self.log: HostLog | None = None
        self.released = False
        # The command that asked for a dump to be prepared, until it is.
        self.preparing: Message | None = None
        # The snapshot's directory that the model host was restored from and maps its memory from.
        self.origin: Path | None = None
        self.origin_identity = (0, 0)
        # The mount points of the model host, besides its root.
        self.mounts: list[str] = []

        # The mount points that a model host gets, and their directories on the node when this process
        # started.
        self.places = {name: Path(name) for name in mounts.node_mounts()}
        self.root = scratch
        # Named after the shim, because two daemons may each have an instance of the same id.
        self.group = scratch.name.partition(".")[0]
        self.pipes = namespaces.Pipes.create()
        self.inodes = self.pipes.inodes()
        mounts.bind_root(self.root)
        points = [mounts.INSTANCE_MOUNT, mounts.MEMORY_MOUNT]
        if weights is not None:
            mounts.make_read_only(weights)
            self.places[mounts.WEIGHTS_MOUNT] = weights
            points.append(mounts.WEIGHTS_MOUNT)
        # Only the processes of an engine see its environment, so that no other image refers to it.
        # One that has been removed must not keep the others from starting.
        self.engines = {mounts.engine_mount(name): place for name, place in engines.items() if place.is_dir()}
        for point, place in self.engines.items():
            mounts.make_read_only(place, programs=True)
            points.append(point)
        for point in points:
            (self.root / point.lstrip("/")).mkdir(parents=True, exist_ok=True)
        self.worker = criu.Worker.start(criu_binary, list(self.pipes.host_ends().values()))
        self.commands: dict[str, Callable[[Message], Message | None]] = {
            "launch": self.launch,
            "restore": self.restore,
            "prepare": self.prepare,
            "abandon": self.abandon,
            "dump": self.dump,
            "freeze": self.freeze,
            "thaw": self.thaw,
            "kill": self.kill,
            "status": self.status,
            "release": self.release,
        }

    # Commands. Each takes a message and returns the fields of its answer, or None if it answers later.

    def launch(self, message: Message) -> Message:
        """Start the model host ``command`` in namespaces of its own, with the environment of ``engine``."""
        self._must_be_empty()
        directory = Path(message["directory"])
        # It has no images, so it does not matter which directory is mounted in their place.
        own = {mounts.INSTANCE_MOUNT: directory, mounts.MEMORY_MOUNT: directory}
        if engine := message.get("engine"):
            point = mounts.engine_mount(engine)
            if point not in self.engines:
                raise CommandRefused(f"this shim has no environment of the engine {engine}")
            own[point] = self.engines[point]
        places = self._places() | own
        self.mounts = sorted(places)
        self.pid = namespaces.launch(
            message["command"], message["environment"], self.pipes, self.root, places
        )
        self.worker.close()
        self._adopt(message["instance"], directory)
        return {"pid": self.pid}

    def restore(self, message: Message) -> Message:
        """Restore the model host from ``images``, with its memory mapped from the snapshot at ``origin``.

        ``pipes`` names the pipes that it had at capture.
        """
        self._must_be_empty()
        directory, origin = Path(message["directory"]), Path(message["origin"])
        own = {mounts.INSTANCE_MOUNT: directory, mounts.MEMORY_MOUNT: origin}
        places = self._places() | self.engines | own
        unknown = set(message["mounts"]) - set(places)
        if unknown:
            raise CommandRefused(
                f"the image needs mounts that this node does not have: {', '.join(sorted(unknown))}"
            )
        layout = criu.Layout({name: places[name] for name in message["mounts"]}, message["pipes"])
        # Other instances map the same files.
        mounts.make_read_only(origin)
        try:
            self.pid = criu.restore(
                self.worker,
                self.pycriu,
                Path(message["images"]),
                self.root,
                layout,
                self.pipes.host_ends(),
                directory,
                message["timeout"],
            )
        except (criu.CriuTimeout, criu.CriuLost):
            # CRIU has ended, so nobody else ends the part of the tree that it had made.
            linux.kill_children()
            raise
        self.origin, self.origin_identity = origin, mounts.identity(origin)
        self.mounts = sorted(message["mounts"])
        self._adopt(message["instance"], directory)
        return {"pid": self.pid}

    def prepare(self, message: Message) -> None:
        """Prepare a dump into ``images``, while the model host still serves."""
        self._must_run()
        self._abandon()
        self.dumper.prepare(self.pid, Path(message["images"]))
        self.preparing = message
        self.selector.register(self._page_server(), selectors.EVENT_READ, self._prepared)

    def abandon(self, message: Message) -> Message:
        """Undo :meth:`prepare`, unless a dump has followed it."""
        self._abandon()
        return {}

    def dump(self, message: Message) -> Message:
        """Write the model host into ``images``; it runs on. The answer is what a restore needs."""
        self._must_run()
        if self.origin is not None and mounts.identity(self.origin) != self.origin_identity:
            raise OriginGone(
                f"the snapshot that {self.instance} was restored from is deleted, and most of its memory is "
                "mapped from there; capture an instance that was started, or restored from a snapshot in use"
            )
        layout = criu.Layout({name: Path(name) for name in self.mounts}, self.inodes)
        self.dumper.dump(self.pid, Path(message["images"]), layout, message["timeout"])
        origin = str(self.origin) if self.origin else ""
        return {"mounts": self.mounts, "pipes": self.inodes, "origin": origin}

    def freeze(self, message: Message) -> Message:
        """Stop the model host from running."""
        self._must_run().freeze()
        self.frozen = True
        return {}

    def thaw(self, message: Message) -> Message:
        """Let the model host run again."""
        self._must_run().thaw()
        self.frozen = False
        return {}

    def kill(self, message: Message) -> Message:
        """End the model host and everything else in its pid namespace, and wait until it has ended."""
        if self.pid and self.exit_status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            if self.freezer is not None and self.frozen:
                self.freezer.thaw()
            _, status = os.waitpid(self.pid, 0)
            self._ended(status)
        return {}

    def status(self, message: Message) -> Message:
        """The state of the model host, for a daemon that takes it over."""
        return {
            "instance": self.instance,
            "pid": self.pid,
            "frozen": self.frozen,
            "exit_status": self.exit_status,
        }

    def release(self, message: Message) -> Message:
        """End the model host and this process."""
        self.kill(message)
        self.released = True
        return {}

    # Events

    def serve(self, listener: socket.socket) -> None:
        """Handle commands and events until released."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake_write)
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        self.selector.register(wake_read, selectors.EVENT_READ, self._reap)
        while not self.released:
            for key, _ in self.selector.select():
                key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        # From now on the end of the connection shows that the daemon has ended.
        linux.end_with_parent(0)
        if self.client is not None:
            # The newest snapshotd owns the instance. An older one has lost its lock on the state directory.
            self._disconnect()
        self.client = JsonLines(connection.detach())
        self.selector.register(self.client.fd, selectors.EVENT_READ, self._from_client)

    def _disconnect(self) -> None:
        if self.client is not None:
            self.selector.unregister(self.client.fd)
            self.client.close()
            self.client = None
            # The daemon that prepared a dump will not ask for it any more.
            self._abandon()

    def _from_client(self, fd: int) -> None:
        if self.client is None:
            # Disconnected since the selector reported it.
            return
        messages = self.client.receive()
        if messages is None:
            self._disconnect()
            # Without a model host there is no reason to outlive the daemon.
            self.released = not self.pid
            return
        for message in messages:
            self._handle(message)

    def _handle(self, message: Message) -> None:
        if message["do"] == "host":
            self._answer(message, self._pass_on)
        elif message["do"] in self.commands:
            self._answer(message, self.commands[message["do"]])
        else:
            self._answer(message, _refuse)

    def _pass_on(self, message: Message) -> None:
        """Pass a message on to the model host, which answers it."""
        self._must_run()
        forwarded = message["message"] | {"id": message.get("id")}
        # The model host is ending. The report of its end answers this message as well.
        with contextlib.suppress(BrokenPipeError):
            os.write(self.pipes.to_host, json.dumps(forwarded).encode() + b"\n")

    def _answer(self, message: Message, command: Callable[[Message], Message | None]) -> None:
        answer: Message = {"id": message.get("id")}
        try:
            result = command(message)
            if result is None:
                return
            answer["ok"] = result
        except OriginGone as error:
            answer["error"] = {"reason": "ORIGIN_GONE", "message": str(error)}
        except CommandRefused as error:
            answer["error"] = {"reason": "SHIM_REFUSED", "message": str(error)}
        except criu.CriuLost as error:
            answer["error"] = {"reason": "CRIU_LOST", "message": str(error)}
        except criu.CriuTimeout as error:
            answer["error"] = {"reason": "CRIU_TIMEOUT", "message": str(error)}
        except criu.CriuFailed as error:
            answer["error"] = {"reason": "CRIU_FAILED", "message": str(error)}
        except OSError as error:
            answer["error"] = {"reason": "OS_ERROR", "message": str(error)}
        self._send(answer)

    def _prepared(self, connection: socket.socket) -> None:
        if self.preparing is None or connection is not self.dumper.connection:
            # Abandoned since the selector reported it.
            return
        message, self.preparing = self.preparing, None
        self.selector.unregister(connection)
        self._answer(message, self._complete)

    def _complete(self, message: Message) -> Message:
        self.dumper.complete()
        return {}

    def _abandon(self) -> None:
        if self.preparing is not None:
            self.preparing = None
            self.selector.unregister(self._page_server())
        self.dumper.abandon()

    def _page_server(self) -> socket.socket:
        assert self.dumper.connection is not None
        return self.dumper.connection

    def _from_host(self, fd: int) -> None:
        assert self.host is not None
        messages = self.host.receive()
        if messages is None:
            self.selector.unregister(fd)
            return
        for message in messages:
            self._send(message)

    def _from_log(self, fd: int) -> None:
        if fd not in self.selector.get_map():
            # Drained to its end since the selector reported it.
            return
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        if not data:
            self.selector.unregister(fd)
        elif self.log is not None:
            self.log.write(data)

    def _reap(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 4096)
        self.dumper.reap()
        if self.pid and self.exit_status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._ended(status)

    def _send(self, message: Message) -> None:
        if self.client is not None:
            try:
                self.client.send(message)
            except OSError:
                self._disconnect()

    def _adopt(self, instance: str, directory: Path) -> None:
        self.instance = instance
        self.freezer = Freezer.create(self.group, self.pid)
        self.memory = MemoryLimit.create(self.group, self.pid, self.memory_bytes)
        self.pipes.close_host_ends()
        self.log = HostLog(directory / "host.log")
        os.set_blocking(self.pipes.log, False)
        self.host = JsonLines(self.pipes.from_host)
        self.selector.register(self.pipes.from_host, selectors.EVENT_READ, self._from_host)
        self.selector.register(self.pipes.log, selectors.EVENT_READ, self._from_log)

    def _ended(self, status: int) -> None:
        self.exit_status = status
        self.frozen = False
        exceeded = self.memory is not None and self.memory.exceeded()
        if self.memory is not None:
            self.memory.remove()
        if self.freezer is not None:
            self.freezer.remove()
        said = ""
        if self.log is not None and os.WIFEXITED(status) and status:
            # Its log may say why. The last lines are still in the pipe, so they are read before they are
            # lost.
            while self.pipes.log in self.selector.get_map() and select.select([self.pipes.log], [], [], 0)[0]:
                self._from_log(self.pipes.log)
            said = self.log.last_line()
        event: Message = {"event": "exited", "status": status, "said": said}
        if exceeded:
            event["memory_limit"] = self.memory_bytes
        self._send(event)

    def _places(self) -> dict[str, Path]:
        """The places that are still mounted on the node. This process may have started long ago."""
        still = {*mounts.node_mounts(), mounts.WEIGHTS_MOUNT}
        return {name: place for name, place in self.places.items() if name in still}

    def _must_be_empty(self) -> None:
        if self.pid:
            raise CommandRefused(f"this shim already holds {self.instance}")

    def _must_run(self) -> Freezer:
        if self.freezer is None or self.exit_status is not None:
            raise CommandRefused("no model host runs here")
        return self.freezer


def _refuse(message: Message) -> Message:
    raise CommandRefused(
        f"{message['do']!r} is unknown here; this shim is of another version than its snapshotd"
    )

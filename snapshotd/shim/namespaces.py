"""Start a process in namespaces of its own: pid, mount, net and ipc.

Its own pid namespace lets two copies of one snapshot carry the same pids; its own net namespace
lets both hold the CUDA driver's abstract socket and leaves a model without a network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotd.system import linux, mounts

CONTROL_IN = 3
CONTROL_OUT = 4
# Of 1000: as if it had half of the node's memory more than it has.
OOM_SCORE = "500"


@dataclass
class Pipes:
    """The model host's three pipes: commands to it, replies from it, and what it prints.

    Pipes and no sockets: a socket would belong to the node's net namespace, where CRIU does not
    find it. Each restore gets fresh ones in place of those that were open at capture.
    """

    host_in: int
    to_host: int
    from_host: int
    host_out: int
    log: int
    host_log: int

    @classmethod
    def create(cls) -> Pipes:
        host_in, to_host = os.pipe()
        from_host, host_out = os.pipe()
        log, host_log = os.pipe()
        return cls(host_in, to_host, from_host, host_out, log, host_log)

    def inodes(self) -> dict[str, int]:
        """The names under which a dump of the model host knows its ends."""
        ends = {"control_in": self.host_in, "control_out": self.host_out, "log": self.host_log}
        return {name: os.fstat(fd).st_ino for name, fd in ends.items()}

    def host_ends(self) -> dict[str, int]:
        return {"control_in": self.host_in, "control_out": self.host_out, "log": self.host_log}

    def close_host_ends(self) -> None:
        """After the model host has them: its exit must show as end of file on ours."""
        for fd in (self.host_in, self.host_out, self.host_log):
            os.close(fd)


def launch(
    command: Sequence[str],
    environment: Mapping[str, str],
    pipes: Pipes,
    root: Path,
    places: Mapping[str, Path],
) -> int:
    """Start ``command`` in new namespaces as a child of this process.

    Args:
        root, places: as :func:`mounts.enter_root` takes them.

    Returns:
        Its pid as this process sees it; inside it is 1.

    Raises:
        OSError: a namespace, a mount or the command was refused; nothing runs.
    """
    report_read, report_write = os.pipe()
    pid_read, pid_write = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            os.close(report_read)
            linux.unshare(linux.CLONE_NEWPID | linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC)
            host = os.fork()
            if host == 0:
                _become_host(command, environment, pipes, root, places)
            os.write(pid_write, b"%d" % host)
            os._exit(0)
        except BaseException as error:
            os.write(report_write, f"{getattr(error, 'errno', 0) or 0} {error}".encode())
            os._exit(1)
    # The middle process exits at once; as subreaper this process inherits the model host.
    os.close(report_write)
    os.close(pid_write)
    os.waitpid(middle, 0)
    pid = int(os.read(pid_read, 32) or 0)
    report = b""
    while part := os.read(report_read, 4096):
        report += part
    os.close(pid_read)
    os.close(report_read)
    if report:
        if pid:
            os.waitpid(pid, 0)
        number, _, message = report.decode(errors="replace").partition(" ")
        raise OSError(int(number), message)
    return pid


def _become_host(
    command: Sequence[str],
    environment: Mapping[str, str],
    pipes: Pipes,
    root: Path,
    places: Mapping[str, Path],
) -> None:
    # CRIU dumps a pid namespace only from a session leader.
    os.setsid()
    mounts.enter_root(root, places)
    # Opened inside the new mount namespace, else CRIU cannot tell which mount it is on.
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(pipes.host_log, 1)
    os.dup2(pipes.host_log, 2)
    # Moved out of the way first: a pipe end may already sit on 3 or 4.
    control_in = _above(pipes.host_in, 32)
    control_out = _above(pipes.host_out, 32)
    os.dup2(control_in, CONTROL_IN, inheritable=True)
    os.dup2(control_out, CONTROL_OUT, inheritable=True)
    os.umask(0o077)
    # Where memory cannot be bound: when the node has none left, this ends before the node's own services.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Whatever else came down from a parent must not be open in the model host: CRIU would refuse it.
    for name in Path("/proc/self/fd").iterdir():
        if int(name.name) > CONTROL_OUT:
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name.name), False)
    os.execvpe(command[0], list(command), dict(environment))


def _above(fd: int, lowest: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)

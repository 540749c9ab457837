"""Start a process in namespaces of its own: pid, mount, net and ipc.

With pid namespaces of their own, two copies of a snapshot can have the same pids. With net namespaces of
their own, both can hold the CUDA driver's abstract socket, and a model has no network.
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
    """The three pipes of a model host: commands to it, replies from it, and its output.

    They are not sockets, because a socket would belong to the node's net namespace, where CRIU does not find
    it. A restored process gets new pipes in place of those that it had at capture.
    """

    host_in: int
    to_host: int
    from_host: int
    host_out: int
    log: int
    host_log: int

    @classmethod
    def create(cls) -> Pipes:
        """Make the pipes."""
        host_in, to_host = os.pipe()
        from_host, host_out = os.pipe()
        log, host_log = os.pipe()
        return cls(host_in, to_host, from_host, host_out, log, host_log)

    def inodes(self) -> dict[str, int]:
        """The inodes by which a dump knows the model host's ends, by role."""
        ends = {"control_in": self.host_in, "control_out": self.host_out, "log": self.host_log}
        return {name: os.fstat(fd).st_ino for name, fd in ends.items()}

    def host_ends(self) -> dict[str, int]:
        """The descriptors of the model host's ends, by role."""
        return {"control_in": self.host_in, "control_out": self.host_out, "log": self.host_log}

    def close_host_ends(self) -> None:
        """Close the model host's ends once it has them, so that its exit ends the file on our ends."""
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
        root, places: as for :func:`mounts.enter_root`.

    Returns:
        The pid of the command as this process sees it; inside its namespace it is 1.

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
    # The middle process exits at once, and this process, a subreaper, inherits the model host.
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
    # CRIU can dump a pid namespace only if its first process is a session leader.
    os.setsid()
    mounts.enter_root(root, places)
    # Opened in the new mount namespace, or CRIU could not tell which mount it is on.
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(pipes.host_log, 1)
    os.dup2(pipes.host_log, 2)
    # Duplicated to higher numbers first, because an end may be on descriptor 3 or 4 already.
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
    # Other inherited descriptors must not be open in the model host, because CRIU would refuse to dump them.
    for name in Path("/proc/self/fd").iterdir():
        if int(name.name) > CONTROL_OUT:
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name.name), False)
    os.execvpe(command[0], list(command), dict(environment))


def _above(fd: int, lowest: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)

"""Install an engine: an environment of its own, of pinned packages whose files have the hashes given.

An environment is made where it will be used, because its programs know their own path, and counts once its
record is written, which is last. What an interrupted installation has left is removed by the next one; what
pip has downloaded by then stays in its cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from blake3 import blake3

from dumont.engines import INSTALLED, parse_version
from dumont.errors import Aborted, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from snapshotd.engines import environment, installed
from snapshotd.engines.installed import Installed

CPU: Final = "cpu"
CUDA: Final = "cuda"
# Besides what the environment takes: pip unpacks beside it, and the node needs some.
SPARE_BYTES: Final = 1 << 30
# What is imported to see that an environment is complete.
IMPORTS: Final = {"vllm": "from vllm.v1.engine.llm_engine import LLMEngine"}
IMPORT_SECONDS: Final = 600.0

# Variables of ours that must not reach pip. Byte code is written once, when packages are installed: the
# environment is mounted read-only where it is used.
NOT_FOR_PIP: Final = frozenset(
    {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PIP_NO_COMPILE", "PIP_CONSTRAINT", "PIP_QUIET"}
)

# Called with a line for people about what is going on.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Lock:
    """A list of pinned packages.

    Attributes:
        name: of its file.
        pythons: the versions of Python, such as "3.11", that it has files for.
        machine: the architecture.
        download: bytes to download.
        disk: bytes that the environment takes.
        packages: how many there are.
    """

    name: str
    engine: str
    version: str
    build: str
    pythons: tuple[str, ...]
    machine: str
    download: int
    disk: int
    packages: int
    text: str

    @property
    def digest(self) -> str:
        """BLAKE3 of the list, in hex."""
        return blake3(self.text.encode()).hexdigest()


def locks() -> list[Lock]:
    """All lists that this version of Dumont has, the newest version of each engine and build first."""
    folder = files("snapshotd.engines").joinpath("locks")
    known = [parse_lock(one.name, one.read_text()) for one in folder.iterdir() if one.name.endswith(".txt")]
    known.sort(key=lambda lock: parse_version(lock.version), reverse=True)
    return sorted(known, key=lambda lock: (lock.engine, lock.build))


def parse_lock(name: str, text: str) -> Lock:
    """Read a list of packages; its first lines say what it is for."""
    engine, version, build = name.removesuffix(".txt").rsplit("-", 2)
    facts = dict(
        line.removeprefix("# ").split(": ", 1)
        for line in text.splitlines()
        if line.startswith("# ") and ": " in line
    )
    return Lock(
        name=name,
        engine=engine,
        version=version,
        build=build,
        pythons=tuple(facts["python"].split()),
        machine=facts["machine"],
        download=int(facts["download"]),
        disk=int(facts["disk"]),
        packages=sum("==" in line for line in text.splitlines() if not line.startswith("#")),
        text=text,
    )


def choose(known: Sequence[Lock], engine: str, version: str, build: str) -> Lock:
    """The list for an engine.

    Args:
        version: empty for the newest.
        build: CPU or CUDA.

    Raises:
        InvalidArgument: UNKNOWN_ENGINE or VERSION_NOT_PINNED.
    """
    if engine not in INSTALLED:
        raise InvalidArgument(
            "UNKNOWN_ENGINE",
            f"an engine that can be installed is one of {', '.join(sorted(INSTALLED))}; got {engine[:40]!r}",
            field="engine",
        )
    fitting = [lock for lock in known if (lock.engine, lock.build) == (engine, build)]
    for lock in fitting:
        if version in ("", lock.version):
            return lock
    raise InvalidArgument(
        "VERSION_NOT_PINNED",
        f"{engine} {version} ({build}) is not among the versions whose packages are pinned here: "
        f"{', '.join(lock.version for lock in fitting) or 'none'}; leave --version out, or make an "
        "environment yourself and name its interpreter with --engine-python",
        field="version",
        metadata={"version": version, "build": build},
    )


def install(lock: Lock, root: Path, directory: Path | None, python: str, say: Say) -> tuple[Installed, bool]:
    """Make an environment, unless it is there.

    Args:
        root: where environments are found without being named.
        directory: of the environment; None for one below ``root``.
        python: the interpreter to make it with.

    Returns:
        The environment, and whether it was made now.

    Raises:
        FailedPrecondition: ENGINE_PYTHON_UNSUPPORTED, MACHINE_UNSUPPORTED, DIRECTORY_IN_USE or
            ENGINE_UNUSABLE.
        ResourceExhausted: DISK_FULL.
        Aborted: INSTALL_RUNNING.
        Unavailable: PACKAGES_UNAVAILABLE.
    """
    place = directory or root / lock.engine / f"{lock.version}-{lock.build}-{lock.digest[:8]}"
    if (known := installed.read(place)) is not None:
        if known.lock == lock.digest:
            return known, False
        raise _in_use(place, f"holds {known.engine} {known.version} ({known.build})")
    _check_machine(lock, python)
    with _alone(place):
        begun = _beside(place, "begun")
        if begun.exists():
            say(f"removing what an interrupted installation left in {place}")
            _remove(place)
        elif place.is_dir() and any(place.iterdir()):
            raise _in_use(place, "is not empty")
        _check_disk(lock, place)
        begun.touch()
        try:
            made = _make(lock, place, python, say)
        except BaseException:
            _remove(place)
            raise
        begun.unlink()
        return made, True


def _remove(place: Path) -> None:
    """Remove what an installation has made. If this is interrupted as well, the next one goes on with it."""
    shutil.rmtree(place, ignore_errors=True)
    if not place.exists():
        _beside(place, "begun").unlink(missing_ok=True)


def _beside(place: Path, what: str) -> Path:
    """A file beside an environment that is about it."""
    return place.parent / f".{place.name}.{what}"


def _make(lock: Lock, place: Path, python: str, say: Say) -> Installed:
    place.mkdir(mode=0o755, exist_ok=True)
    say(f"environment in {place}")
    _run([python, "-m", "venv", str(place)], f"{python} cannot make an environment; install python3-venv")
    program = place / "bin" / "python"
    size = f"{lock.download / 1e6:,.0f} MB to download, {lock.disk / 1e9:.1f} GB on disk"
    say(f"{lock.packages} packages, {size}")
    _install_packages(lock, place, program, say)
    say(f"checking that {lock.engine} can be imported")
    examined = environment.examine(lock.engine, program)
    _import(lock, program)
    made = Installed(lock.engine, examined.version, lock.build, place, lock.digest)
    installed.write(made)
    return made


def _install_packages(lock: Lock, place: Path, program: Path, say: Say) -> None:
    requirements = place / "requirements.txt"
    requirements.write_text(lock.text)
    command = [
        str(program), "-m", "pip", "install", "--require-hashes", "--no-deps", "--only-binary", ":all:",
        "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "-r", str(requirements),
    ]  # fmt: skip
    variables = {name: value for name, value in os.environ.items() if name not in NOT_FOR_PIP}
    last: list[str] = []
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                last = [*last[-9:], line.strip()]
                if (progress := _progress(line, lock)) is not None:
                    say(progress)
        except BaseException:
            pip.terminate()
            raise
    if pip.returncode:
        raise _packages_unavailable(lock, last)


def _progress(line: str, lock: Lock) -> str | None:
    """What a line of pip's says to people; None: nothing new."""
    if line.startswith("Collecting "):
        return f"package {line.split()[1].partition('=')[0]}"
    if line.startswith("Installing collected packages"):
        return f"unpacking {lock.packages} packages"
    return None


def _packages_unavailable(lock: Lock, last: Sequence[str]) -> Unavailable:
    said = next(
        (line for line in reversed(last) if line.startswith("ERROR")), last[-1] if last else "nothing"
    )
    hint = (
        "; torch must be its CPU build, so let pip find PyTorch's index of CPU builds (PIP_EXTRA_INDEX_URL "
        "or PIP_FIND_LINKS)"
        if lock.build == CPU and any("torch==" in line or "HASHES" in line for line in last)
        else ""
    )
    return Unavailable(
        "PACKAGES_UNAVAILABLE",
        f"the packages of {lock.engine} {lock.version} could not be installed; pip says: {said[:500]}{hint}; "
        "what it has downloaded is kept for the next attempt",
        metadata={"engine": lock.engine, "version": lock.version},
    )


def _import(lock: Lock, program: Path) -> None:
    try:
        done = subprocess.run(
            [program, "-I", "-c", IMPORTS[lock.engine]],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        said = f"it took more than {IMPORT_SECONDS:g} s"
    else:
        if not done.returncode:
            return
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    raise FailedPrecondition(
        "ENGINE_UNUSABLE",
        f"{lock.engine} {lock.version} ({lock.build}) was installed, cannot be imported here and was "
        f"removed again: {said[:500]}; choose another --build, or make an environment yourself and name its "
        "interpreter with --engine-python",
        metadata={"engine": lock.engine, "version": lock.version},
    )


def _check_machine(lock: Lock, python: str) -> None:
    if platform.machine() != lock.machine:
        raise FailedPrecondition(
            "MACHINE_UNSUPPORTED",
            f"the packages of {lock.engine} {lock.version} ({lock.build}) are pinned for {lock.machine}, and "
            f"this machine is {platform.machine()}; make an environment yourself and name its "
            "interpreter with --engine-python",
        )
    said = _run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], f"{python} does not run"
    ).strip()
    if said not in lock.pythons:
        raise FailedPrecondition(
            "ENGINE_PYTHON_UNSUPPORTED",
            f"the packages of {lock.engine} {lock.version} ({lock.build}) are pinned for Python "
            f"{', '.join(lock.pythons)}, and {python} is {said}; name another one with --python",
            metadata={"python": said},
        )


def _check_disk(lock: Lock, place: Path) -> None:
    existing = next(path for path in place.parents if path.exists())
    free, needed = shutil.disk_usage(existing).free, lock.disk + lock.download + SPARE_BYTES
    if free < needed:
        raise ResourceExhausted(
            "DISK_FULL",
            f"{lock.engine} {lock.version} ({lock.build}) needs {needed / 1e9:.1f} GB at {existing}, which "
            f"has {free / 1e9:.1f}; make room, or choose another place with --directory",
            metadata={"needed": str(needed), "free": str(free)},
        )


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keep other installations away from a directory."""
    place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _beside(place, "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Aborted(
                "INSTALL_RUNNING", f"another installation fills {place}; wait until it has ended"
            ) from None
        yield


def _run(command: Sequence[str], complaint: str) -> str:
    """Run a short program and return what it prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise FailedPrecondition("ENGINE_PYTHON_UNSUPPORTED", f"{complaint}: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise FailedPrecondition("ENGINE_PYTHON_UNSUPPORTED", f"{complaint}: {said}")
    return done.stdout


def _in_use(place: Path, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        "DIRECTORY_IN_USE",
        f"{place} {what}; name another --directory, or remove it if no instance uses it",
        metadata={"directory": str(place)},
    )


def default_python() -> str:
    """The interpreter that this process runs under, outside any environment."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}")

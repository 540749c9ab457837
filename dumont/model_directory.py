"""What may be read of a model's directory, which others made and which may contain anything.

Only regular files are read, and they are opened without blocking, because opening a pipe could wait for ever.
Except for weights, which cannot be mistaken for anything else, they must be files of the model itself: a link
that leads elsewhere would show the node's own files to anyone who may name a model. The layout of a Hugging
Face cache, in which every file is a link to a blob of the same model, counts as the model itself.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# What a model host reads, besides weights: configurations, tokenizers, chat templates.
SUFFIXES: Final = frozenset({".jinja", ".json", ".model", ".txt"})
# Bytes of a file; the largest tokenizers have 40 MB.
LARGEST: Final = 256 << 20
# Levels of directories below the model's own, such as sentence embedding models have.
DEPTH: Final = 3
MOST_FILES: Final = 10_000


class Unusable(Exception):
    """A file that must not be read. The message continues a sentence that begins with the file's name.

    Attributes:
        file: its path.
    """

    def __init__(self, file: Path, why: str) -> None:
        super().__init__(why)
        self.file = file


def files(folder: Path) -> list[Path]:
    """The files that a model host may read besides the model's own weights, sorted by path.

    Hidden ones are left out. Weights in directories below are among them, which modules of sentence embedding
    models have.

    Raises:
        Unusable: there are too many files.
        OSError: the directory cannot be read.
    """
    found = []
    for path in _walk(folder, DEPTH):
        if path.suffix in SUFFIXES or _of_a_module(folder, path):
            found.append(path)
        if len(found) > MOST_FILES:
            raise Unusable(folder, f"holds more than {MOST_FILES} files")
    return sorted(found)


def _of_a_module(folder: Path, path: Path) -> bool:
    if path.suffix != ".safetensors" or path.parent == folder:
        return False
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size <= LARGEST
    return False


def names(folder: Path) -> frozenset[str]:
    """The paths of all files, relative to ``folder``; hidden ones are left out.

    Raises:
        Unusable: there are too many files.
        OSError: the directory cannot be read.
    """
    found: set[str] = set()
    for path in _walk(folder, DEPTH):
        found.add(path.relative_to(folder).as_posix())
        if len(found) > MOST_FILES:
            raise Unusable(folder, f"holds more than {MOST_FILES} files")
    return frozenset(found)


def check(folder: Path) -> None:
    """Raise unless all files of a directory may be read, before a library reads them.

    Raises:
        Unusable: a file may not be read.
        OSError: a file cannot be opened.
    """
    for file in files(folder):
        with contextlib.suppress(FileNotFoundError):  # a dangling link is not a file
            os.close(_open(folder, file))


def read(folder: Path, file: Path) -> bytes:
    """The contents of a file of the model at ``folder``.

    Raises:
        Unusable: it may not be read.
        FileNotFoundError: it is not there.
        OSError: it cannot be read.
    """
    with open(_open(folder, file), "rb") as opened:
        data = opened.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise Unusable(file, f"has more than {LARGEST} bytes")
    return data


def check_weights(file: Path) -> None:
    """Find out whether a weight file may be opened and mapped.

    Raises:
        Unusable: it is no regular file.
        FileNotFoundError: it is not there.
        OSError: it cannot be asked.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise Unusable(file, "is not a regular file")


def _open(folder: Path, file: Path) -> int:
    """A descriptor of it; what is opened is what is checked."""
    # Asked first as well: to open a device may do something.
    if not stat.S_ISREG(file.stat().st_mode):
        raise Unusable(file, "is not a regular file")
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unusable(file, "is not a regular file")
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not any(target.is_relative_to(home) for home in _homes(folder)):
            raise Unusable(file, f"is a link that leads out of the model's directory, to {target}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _homes(folder: Path) -> Iterator[Path]:
    """The directories whose files are the model's own."""
    real = folder.resolve()
    yield real
    # A hub's cache: models--ORGANISATION--NAME/snapshots/REVISION.
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        yield real.parent.parent / "blobs"


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth > 1:
                yield from _walk(Path(entry.path), depth - 1)
        else:
            yield Path(entry.path)

"""The identity of the controller's last start, kept in the state directory apart from the database."""

from __future__ import annotations

import json
import os
from pathlib import Path

from controller.identity import Identity
from dumont.errors import FailedPrecondition

NAME = "controller.json"


def read(state_dir: Path) -> Identity | None:
    """The controller that was started here last; None: there was none.

    Raises:
        FailedPrecondition: STATE_UNUSABLE, the file is there and cannot be read.
    """
    path = state_dir / NAME
    try:
        document = json.loads(path.read_bytes())
        return Identity(str(document["id"]), int(document["starts"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            "STATE_UNUSABLE",
            f"{path} cannot be read: {error}; restore it from a backup, or remove it if the database is "
            "right",
            metadata={"path": str(path)},
        ) from error


def write(state_dir: Path, identity: Identity) -> None:
    """Replace the identity in one step; it is on the disk when this returns.

    Raises:
        FailedPrecondition: STATE_UNUSABLE.
    """
    path = state_dir / NAME
    staged = path.with_suffix(".new")
    try:
        with staged.open("w") as file:
            json.dump({"id": identity.id, "starts": identity.starts}, file)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise FailedPrecondition(
            "STATE_UNUSABLE",
            f"{path} cannot be written: {error.strerror or error}",
            metadata={"path": str(path)},
        ) from error

"""Errors cross a process boundary whole: a process pool hands them over by pickle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest

from dumont.errors import DumontError

# Where a subclass may be defined; importing the modules makes it known.
for module in ("dumont", "dumont.rpc.status", "controller.ports", "snapshotd.ports", "model_host.engine"):
    import_module(module)


def kinds(base: type[DumontError] = DumontError) -> Iterator[type[DumontError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


def pickled(error: DumontError) -> DumontError:
    again: DumontError = pickle.loads(pickle.dumps(error))
    return again


@pytest.mark.parametrize("kind", sorted(set(kinds()), key=str))
@pytest.mark.parametrize("copied", [pickled, copy.copy, copy.deepcopy])
def test_every_error_can_be_pickled_and_copied(
    kind: type[DumontError], copied: Callable[[DumontError], DumontError]
) -> None:
    # Subclasses may be made of something else, such as the states of an illegal transition.
    error = kind.__new__(kind)
    DumontError.__init__(error, "NO_ROOM", "no room", metadata={"free": "0"}, field="model", retry_after=2.5)
    error.add_note("seen in a worker")

    again = copied(error)

    assert type(again) is kind
    assert vars(again) == vars(error)
    assert (str(again), repr(again)) == (str(error), repr(error))

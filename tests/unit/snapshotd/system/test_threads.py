"""Work that hangs is given up on, and the thread that it keeps is lost only to work of its own kind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from dumont.errors import Unavailable
from snapshotd.system.threads import PatientThreads


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What a read from a mount that hangs waits for."""
    event = threading.Event()
    yield event
    event.set()


async def test_work_gives_its_result_or_its_error() -> None:
    threads = PatientThreads("a test")

    assert await threads.run(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)


async def test_work_that_hangs_is_given_up(hanging: threading.Event) -> None:
    threads = PatientThreads("reading the model", count=2, seconds=0.02)

    with pytest.raises(Unavailable) as refused:
        await threads.run(hanging.wait)

    assert refused.value.reason == "FILES_HANG"
    assert "reading the model" in refused.value.message
    # Another thread is free.
    assert await threads.run(lambda: 3) == 3


async def test_more_work_than_threads_waits_no_longer_than_any_other(hanging: threading.Event) -> None:
    threads = PatientThreads("reading the model", count=1, seconds=0.02)
    with pytest.raises(Unavailable):
        await threads.run(hanging.wait)

    with pytest.raises(Unavailable):
        await threads.run(lambda: 3)

    # A thread whose work ends after all is used again.
    hanging.set()
    assert await threads.run(lambda: 3, seconds=10) == 3


async def test_one_subject_that_hangs_leaves_threads_to_the_others(hanging: threading.Event) -> None:
    # given: a model whose files hang, tried again and again
    threads = PatientThreads("reading the model", count=4, seconds=0.02)
    for _ in range(6):
        with pytest.raises(Unavailable):
            await threads.run(hanging.wait, subject="/mnt/hangs")

    # then another model is read,
    assert await threads.run(lambda: 3, subject="/models/other") == 3

    # and the first one, too, when its files can be read again
    hanging.set()
    assert await threads.run(lambda: 3, subject="/mnt/hangs", seconds=10) == 3


async def test_a_thread_that_hangs_keeps_no_process_from_ending(hanging: threading.Event) -> None:
    threads = PatientThreads("reading the model", seconds=0.02)

    with pytest.raises(Unavailable):
        await threads.run(hanging.wait)

    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "reading the model")

"""A process that forks, as gunicorn, celery and multiprocessing do, while it has a client."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rpc.fake_controller import Served

Run = Callable[[str], list[str]]

# Runs in a process of its own, because a fork of pytest's would take its threads' locks along.
BEFORE = """
import asyncio, multiprocessing, os, sys
import dumont

def forked(work):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(work()))
    child.start()
    print(results.get(timeout=20))
    child.join(20)
    assert child.exitcode == 0, child.exitcode

def tried(work):
    def run():
        try:
            return work()
        except dumont.DumontError as error:
            return error.reason
    return run
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def run(served: Served, tmp_path: Path) -> Run:
    served.controller.reset()

    def run(program: str) -> list[str]:
        script = tmp_path / "program.py"
        script.write_text(BEFORE + program)
        ended = subprocess.run(
            [sys.executable, script],
            env={"DUMONT_ENDPOINT": served.address, "PATH": "/usr/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.split()

    return run


def test_a_client_that_was_made_before_a_fork_works_after_it(run: Run) -> None:
    assert run("""
client = dumont.Client()
forked(lambda: client.deploy("org/model", name="made").name)
forked(lambda: [d.name for d in client.deployments.list()])
print(len(client.deployments.list()))
""") == ["deployments/made", "['deployments/made']", "1"]


def test_a_client_that_was_used_before_a_fork_is_refused_at_once_after_it(run: Run) -> None:
    assert run("""
deployment = dumont.deploy("org/model", name="used")
forked(tried(lambda: deployment.generate("Count", timeout=5).text))
forked(tried(lambda: dumont.Client().deployments.list()))
forked(tried(lambda: dumont.deploy("org/model")))
print(len(deployment.generate("Count").text.split()))
""") == [*["FORKED_AFTER_USE"] * 3, "3"]


def test_so_is_an_asynchronous_client(run: Run) -> None:
    assert run("""
async def names(client):
    return [d.name for d in await client.deployments.list()]

client = dumont.AsyncClient()
forked(lambda: len(asyncio.run(names(client))))
print(len(asyncio.run(names(client))))
forked(tried(lambda: asyncio.run(names(client))))
forked(tried(lambda: asyncio.run(names(dumont.AsyncClient()))))
""") == ["0", "0", "FORKED_AFTER_USE", "FORKED_AFTER_USE"]


def test_a_deployment_and_an_error_are_handed_to_a_pool_and_back(run: Run) -> None:
    assert run("""
from concurrent.futures import ProcessPoolExecutor

def count(deployment, prompt):
    return deployment.generate(prompt).text

if __name__ == "__main__":
    deployment = dumont.deploy("org/model", name="pooled")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        print(pool.submit(count, deployment, "Count").result())
        print(pool.submit(count, deployment, "full").exception().reason)
""") == ["one", "two", "three", "QUEUE_FULL"]

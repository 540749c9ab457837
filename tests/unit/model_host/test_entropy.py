"""Two hosts woken with different entropy never draw alike; the same entropy gives the same draws."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from dumont.errors import InvalidArgument
from model_host import entropy


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    python, array = random.getstate(), numpy.random.get_state()
    yield
    random.setstate(python)
    numpy.random.set_state(array)


def draw_after(seed: bytes) -> dict[str, Any]:
    entropy.reseed(seed)
    return entropy.draws()


def test_different_entropy_different_draws_from_every_generator() -> None:
    first, second = draw_after(b"a" * 32), draw_after(b"b" * 32)

    assert {"python", "numpy", "urandom", "tempfile", "openssl"} <= first.keys()
    assert [name for name in first if first[name] == second[name]] == []


def test_the_same_entropy_gives_the_same_draws_but_for_the_kernels() -> None:
    first, second = draw_after(b"a" * 32), draw_after(b"a" * 32)

    assert first["python"] == second["python"]
    assert first["numpy"] == second["numpy"]
    assert first["urandom"] != second["urandom"]


def test_generators_that_something_holds_are_reseeded_too() -> None:
    # Given generators of every kind, each held by somebody
    holder: dict[str, Any] = {
        "python": random.Random(1),
        "generator": numpy.random.default_rng(1),
        "older": numpy.random.RandomState(1),
    }
    found = entropy.held()
    assert all(any(one is generator for one in found) for generator in holder.values())

    def draw(seed: bytes) -> list[float]:
        entropy.reseed(seed, found)
        return [holder["python"].gauss(0, 1), holder["generator"].normal(), holder["older"].normal()]

    # When the same state goes on with two different entropies
    first, second, again = draw(b"a" * 32), draw(b"b" * 32), draw(b"a" * 32)

    # Then none of them draws alike, and the entropy alone decides
    assert first == again
    assert not set(first) & set(second)


def test_the_kernels_generator_is_none_that_could_be_reseeded() -> None:
    system = random.SystemRandom()

    assert not any(one is system for one in entropy.held())


def test_temporary_files_get_other_names_in_each_replica() -> None:
    before = tempfile._get_candidate_names()  # type: ignore[attr-defined]

    entropy.reseed(b"a" * 32)

    # A new sequence is seeded by the kernel.
    assert tempfile._get_candidate_names() is not before  # type: ignore[attr-defined]


def test_entropy_is_32_bytes_in_hexadecimal() -> None:
    assert entropy.parse("0f" * 32) == b"\x0f" * 32
    with pytest.raises(InvalidArgument):
        entropy.parse("0f" * 31)

"""Two hosts woken with different entropy never draw alike; the same entropy gives the same draws."""

from __future__ import annotations

import random
from collections.abc import Iterator

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


def draw_after(seed: bytes) -> dict[str, object]:
    entropy.reseed(seed)
    return entropy.draws()


def test_different_entropy_different_draws_from_every_generator() -> None:
    first, second = draw_after(b"a" * 32), draw_after(b"b" * 32)

    assert {"python", "numpy", "urandom"} <= first.keys()
    assert [name for name in first if first[name] == second[name]] == []


def test_the_same_entropy_gives_the_same_draws_but_for_the_kernels() -> None:
    first, second = draw_after(b"a" * 32), draw_after(b"a" * 32)

    assert first["python"] == second["python"]
    assert first["numpy"] == second["numpy"]
    assert first["urandom"] != second["urandom"]


def test_entropy_is_32_bytes_in_hexadecimal() -> None:
    assert entropy.parse("0f" * 32) == b"\x0f" * 32
    with pytest.raises(InvalidArgument):
        entropy.parse("0f" * 31)

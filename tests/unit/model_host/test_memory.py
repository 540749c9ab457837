"""Zero pages go back to the kernel, and memory reads as it did before."""

from __future__ import annotations

import ctypes
import mmap
from hashlib import sha256
from pathlib import Path

from model_host import memory

PAGE = mmap.PAGESIZE


def resident(start: int, end: int) -> int:
    """Pages of a range that the kernel holds for this process."""
    with Path("/proc/self/pagemap").open("rb") as entries:
        entries.seek(start // PAGE * 8)
        data = entries.read((end - start) // PAGE * 8)
    return sum(data[place + 7] >> 7 for place in range(0, len(data), 8))


def test_zero_pages_of_new_memory_are_given_back_and_the_rest_stays() -> None:
    # given memory that was not there before, written everywhere, mostly with zeros
    known = memory.ranges()
    size = 2 * memory.SMALLEST
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(bytes(size))
        block[PAGE * 7] = 1
        block[size - 1] = 2
        before = sha256(block).digest()
        start = ctypes.addressof(ctypes.c_char.from_buffer(block))
        assert resident(start, start + size) == size // PAGE

        # when its zero pages are dropped
        dropped = memory.drop_zero_pages(known)

        # then two pages are left, and it reads as before
        assert dropped >= size - 2 * PAGE
        assert resident(start, start + size) == 2
        assert sha256(block).digest() == before


def test_memory_that_was_there_before_is_left_alone() -> None:
    with mmap.mmap(-1, memory.SMALLEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(bytes(memory.SMALLEST))

        assert memory.drop_zero_pages(memory.ranges()) == 0


def test_what_is_beyond_known_ranges_is_found_on_both_sides_and_between() -> None:
    known = [(10, 20), (30, 40)]

    assert list(memory.beyond([(0, 50)], known)) == [(0, 10), (20, 30), (40, 50)]
    assert list(memory.beyond([(10, 20), (35, 45), (60, 70)], known)) == [(40, 45), (60, 70)]
    assert list(memory.beyond([(12, 18)], known)) == []

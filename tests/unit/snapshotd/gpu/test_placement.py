"""Which GPU an instance goes to, and the map that brings it there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dumont.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from snapshotd.gpu.placement import Reservations, arrange, check_free_memory, choose, device_map, named
from snapshotd.model import Gpu

GIB = 1 << 30
A, B, C = (Gpu(f"GPU-{name}", "H100", 80 * GIB) for name in "abc")
OTHER = Gpu("GPU-x", "A100", 80 * GIB)


def test_nobody_says_so_it_is_the_one_with_the_most_room() -> None:
    assert choose([A, B, C], {A.uuid: 1, B.uuid: 3, C.uuid: 2}, home=A) == B


def test_among_equals_it_is_where_it_comes_from_and_without_that_the_first() -> None:
    free = {A.uuid: 5, B.uuid: 5}
    assert choose([A, B], free, home=B) == B
    assert choose([A, B], free, home=None) == A


@pytest.mark.parametrize("different", [{"model": "A100"}, {"memory_total": 40 * GIB}])
def test_room_on_a_gpu_of_another_kind_is_no_room(different: dict[str, Any]) -> None:
    stranger = replace(B, **different)
    free = {A.uuid: 1, B.uuid: 9}
    assert choose([A, stranger], free, home=A) == A
    assert choose([A, stranger], free, home=None) == stranger
    with pytest.raises(FailedPrecondition) as refusal:
        choose([A, stranger], free, home=A, wanted=stranger.uuid)
    assert refusal.value.reason == "GPU_MODEL"
    assert refusal.value.metadata == {"gpu": stranger.uuid, "home": A.uuid}


@pytest.mark.parametrize("wanted", ["GPU-b", "1"])
def test_who_names_a_gpu_gets_it_however_full(wanted: str) -> None:
    assert choose([A, B], {A.uuid: 9, B.uuid: 0}, home=A, wanted=wanted) == B


@pytest.mark.parametrize("wanted", ["2", "-1", "GPU-z", "cuda:0"])
def test_a_gpu_that_is_not_here_is_refused_with_those_that_are(wanted: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        named([A, B], wanted)
    assert refusal.value.reason == "GPU_UNKNOWN"
    assert refusal.value.field == "gpu"
    assert "0: GPU-a, 1: GPU-b" in refusal.value.message


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    check_free_memory(A, 3 * GIB, 3 * GIB)
    with pytest.raises(ResourceExhausted) as refusal:
        check_free_memory(A, 2 * GIB, 3 * GIB)
    assert refusal.value.reason == "GPU_MEMORY"
    assert refusal.value.metadata == {
        "gpu": "GPU-a",
        "free_bytes": str(2 * GIB),
        "needed_bytes": str(3 * GIB),
    }


def test_what_was_promised_is_counted_until_it_is_released() -> None:
    reservations = Reservations()
    reservations.reserve("one", "GPU-a", 5)
    reservations.reserve("two", "GPU-a", 7)
    reservations.reserve("one", "GPU-b", 1)
    assert (reservations.reserved("GPU-a"), reservations.reserved("GPU-b")) == (7, 1)
    reservations.release("two")
    reservations.release("never-promised")
    assert (reservations.reserved("GPU-a"), reservations.reserved("GPU-b")) == (0, 1)


def test_what_stays_where_it_was_needs_no_map() -> None:
    assert device_map(["a", "b"], ["a", "b"], "a", "a") == {}
    assert device_map(["a", "b"], ["b", "a"], "a", "a") == {}


def test_a_move_lists_every_gpu_of_the_node_and_swaps_two() -> None:
    assert device_map(["a", "b", "c"], ["a", "b", "c"], "a", "c") == {"a": "c", "b": "b", "c": "a"}


def test_on_another_node_the_gpus_are_mapped_in_order_but_for_the_chosen_one() -> None:
    assert device_map(["a", "b"], ["x", "y"], "a", "x") == {"a": "x", "b": "y"}
    assert device_map(["a", "b"], ["x", "y"], "a", "y") == {"a": "y", "b": "x"}


def test_a_gpu_that_was_replaced_is_mapped_and_the_others_stay() -> None:
    assert arrange(["a", "b", "c"], ["b", "x", "c"]) == {"a": "x", "b": "b", "c": "c"}


@pytest.mark.parametrize(
    ("captured", "here", "source", "target"),
    [
        (["a"], ["x", "y"], "a", "x"),
        (["a", "b"], ["x"], "a", "x"),
        ([], ["x"], "", "x"),
        (["a", "a"], ["x", "y"], "a", "x"),
        (["a", "b"], ["x", "y"], "z", "x"),
        (["a", "b"], ["x", "y"], "a", "z"),
    ],
)
def test_a_map_that_cannot_be_is_refused(
    captured: list[str], here: list[str], source: str, target: str
) -> None:
    with pytest.raises(FailedPrecondition) as refusal:
        device_map(captured, here, source, target)
    assert refusal.value.reason == "GPU_MAP"


@given(st.data())
def test_every_map_is_a_permutation_that_brings_the_source_to_its_target(data: st.DataObject) -> None:
    names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)
    captured = data.draw(names)
    here = data.draw(names.filter(lambda gpus: len(gpus) == len(captured)))
    source, target = data.draw(st.sampled_from(captured)), data.draw(st.sampled_from(here))
    mapped = device_map(captured, here, source, target) or {gpu: gpu for gpu in captured}
    assert list(mapped) == captured
    assert sorted(mapped.values()) == sorted(here)
    assert mapped[source] == target

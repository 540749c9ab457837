"""Resource names are strict, and what is built can be parsed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dumont import names
from dumont.errors import InvalidArgument


@given(st.from_regex(names.LABEL, fullmatch=True))
def test_what_is_built_is_parsed(identifier: str) -> None:
    assert names.parse(names.build("nodes", identifier), "nodes", "name") == identifier


@pytest.mark.parametrize("value", ["", "A", "1a", "a-", "-a", "a_b", "a" * 64, "a\n", "a/b", "../a", "ä"])
def test_an_id_is_a_label(value: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        names.check_id(value, "deployment_id")
    assert (raised.value.reason, raised.value.field) == ("INVALID_ID", "deployment_id")


@pytest.mark.parametrize("name", ["", "deployments/", "instances/qa", "/qa"])
def test_a_name_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        names.parse(name, "deployments", "name")
    assert (raised.value.reason, raised.value.field) == ("INVALID_NAME", "name")


def test_new_ids_are_labels_and_differ() -> None:
    made = {names.new_id("capture") for _ in range(100)}
    assert len(made) == 100
    assert all(names.check_id(identifier, "id").startswith("capture-") for identifier in made)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("qaa", "qa"), ("smolm2", "smollm2"), ("QA", "qa"), ("smol", "smollm2"), ("other", ""), ("", "")],
)
def test_what_was_meant_is_the_nearest_name(name: str, meant: str) -> None:
    assert names.did_you_mean(name, ["qa", "smollm2"]) == (f"; did you mean {meant}?" if meant else "")

"""Every causal architecture of transformers says what ``generate`` says, or is refused: no third way.

How each is served is the table of docs/models.md, which this test holds against the code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from dumont import models
from tests.helpers import architectures

NAMES = architectures.architectures()
DOCUMENTED = architectures.documented()


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def test_the_page_lists_them_all() -> None:
    assert list(DOCUMENTED) == sorted(NAMES, key=str.lower)


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_says_what_transformers_says_or_is_refused(name: str, tmp_path: Path) -> None:
    # given a tiny model, a prompt of 7 tokens and one of 700, when it answers with 20, then they are right
    assert architectures.outcome(name, tmp_path) == DOCUMENTED[name]


@pytest.mark.parametrize("name", [name for name in models.REFUSED if name not in models.UNTRIED])
def test_what_is_refused_by_its_name_would_not_be_right(name: str, tmp_path: Path) -> None:
    architectures.must_be_refused(name, tmp_path)

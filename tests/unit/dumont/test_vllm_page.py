"""docs/vllm.md lists the options as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dumont.engines import VLLM_OPTIONS, VLLM_REFUSED, allowed

PAGE = Path(__file__).parents[3] / "docs" / "vllm.md"


def rows() -> Iterator[str]:
    for name, option in VLLM_OPTIONS.items():
        yield f"| `{name}` | {allowed(option)} | {option.meaning} |"
        for inner, part in (option.fields or {}).items():
            yield f"| `{name}.{inner}` | {allowed(part)} | {part.meaning} |"


def test_every_option_is_listed_with_its_values_and_no_other() -> None:
    section = PAGE.read_text().partition("## Options")[2].partition("Refused,")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == list(rows())


def test_every_refused_argument_is_listed_with_the_reason() -> None:
    section = PAGE.read_text().partition("Refused,")[2].partition("\n## ")[0]
    listed = {
        name: line.split(" | ")[1].removesuffix(" |")
        for line in section.splitlines()
        for name in re.findall(r"`(\w+)`", line.partition(" | ")[0])
        if line.startswith("| `")
    }
    assert listed == dict(VLLM_REFUSED)

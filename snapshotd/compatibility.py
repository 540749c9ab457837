"""What must be equal where a snapshot is restored. Pure: facts in, differences out.

A process image holds code pointers, CPU feature decisions and library states of the place where it was
captured; a restore elsewhere may crash at once or, worse, later. So the comparison is exact, and the
refusal names the fact.
"""

from __future__ import annotations

from collections.abc import Mapping

from dumont.errors import FailedPrecondition

# Raised when our own files change such that older snapshots cannot be restored any more.
LAYOUT_VERSION = "2"


def check(snapshot: str, captured: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compare the facts at capture with those of this node.

    Raises:
        FailedPrecondition: a fact differs or is unknown here; it is named.
    """
    for fact in sorted(captured):
        if captured[fact] != here.get(fact):
            raise FailedPrecondition(
                "INCOMPATIBLE",
                f"snapshots/{snapshot} cannot be restored here: {fact} was {captured[fact]} at capture "
                f"and is {here.get(fact, 'unknown')} on this node",
                metadata={"fact": fact, "captured": captured[fact], "here": here.get(fact, "")},
            )

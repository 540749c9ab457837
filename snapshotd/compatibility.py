"""The facts that must be the same where a snapshot is restored. Pure: facts in, differences out.

A process image contains code pointers, choices made for the CPU's features, and the state of libraries, all
of the node where it was captured. Restored on another kind of node, it may crash at once or, worse, later.
So the comparison is exact, and the refusal names the fact.
"""

from __future__ import annotations

from collections.abc import Mapping

from dumont.errors import FailedPrecondition

# Increase this number when our own files change such that older snapshots can no longer be restored.
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


def check_model(snapshot: str, model: str, captured: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compare the files of a model besides its weights: what a process has read of them is in its memory.

    Args:
        captured: the digest of each at capture, by name.
        here: of each that is there now.

    Raises:
        FailedPrecondition: MODEL_CHANGED; the files that differ are named.
    """
    changed = sorted(name for name in captured.keys() | here.keys() if captured.get(name) != here.get(name))
    if changed:
        raise FailedPrecondition(
            "MODEL_CHANGED",
            f"snapshots/{snapshot} is of {model} before {', '.join(changed[:5])} changed; start it cold, and "
            "capture it again",
            metadata={"snapshot": snapshot, "files": ",".join(changed[:20])},
        )

"""Named places where a test, or an operator rehearsing a fault, makes the daemon fail.

Failpoints are named after the steps of jobs: ``capture.dump`` fails before the step runs and
``capture.dump.after`` once it has run. ``--failpoints capture.dump=error,restore.wake.after=exit`` sets two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from dumont.errors import Internal

ACTIONS = ("error", "exit")
# Exit status of a daemon that was made to crash: EX_SOFTWARE of sysexits.h.
CRASHED = 70


class Failpoints:
    """The action of each failpoint: ``error`` raises, ``exit`` ends the daemon at once, as a crash would."""

    def __init__(self, actions: Mapping[str, str] | None = None) -> None:
        self.actions = dict(actions or {})

    @classmethod
    def parse(cls, text: str) -> Failpoints:
        """Read ``name=action,name=action``.

        Raises:
            ValueError: an action is unknown.
        """
        actions = dict(item.strip().split("=", 1) for item in text.split(",") if item.strip())
        for name, action in actions.items():
            if action not in ACTIONS:
                raise ValueError(
                    f"failpoint {name}: the action must be one of {', '.join(ACTIONS)}; got {action!r}"
                )
        return cls(actions)

    def hit(self, name: str) -> None:
        """Do what was set for the failpoint ``name``, if anything was.

        Raises:
            Internal: FAILPOINT, the action is ``error``.
        """
        action = self.actions.get(name)
        if action == "exit":
            os._exit(CRASHED)
        if action == "error":
            raise Internal("FAILPOINT", f"failpoint {name}", metadata={"failpoint": name})

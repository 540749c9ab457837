"""snapshotd, which a test can make to crash at a failpoint while it runs.

    python -m tests.node.failing_snapshotd FILE SNAPSHOTD_ARGUMENT...

It ends when it comes to the failpoint that FILE names, if there is such a file. The flag ``--failpoints``
does the same for a snapshotd that is started with it, but a second start takes longer than most tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from snapshotd import main
from snapshotd.failpoints import CRASHED, Failpoints


def crash_at_what_is_named_in(file: Path) -> None:
    """Have every failpoint look into ``file`` first."""
    hit = Failpoints.hit

    def look_and_hit(self: Failpoints, name: str) -> None:
        if file.exists() and file.read_text() == name:
            os._exit(CRASHED)
        hit(self, name)

    Failpoints.hit = look_and_hit  # type: ignore[method-assign]


if __name__ == "__main__":
    crash_at_what_is_named_in(Path(sys.argv.pop(1)))
    main.main()

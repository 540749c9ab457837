"""The jobs of a node, each an ordered list of named steps: start, capture, restore, park, resume, stop.

Read a list from top to bottom and you have read the job. What a step leaves behind, its ``undo`` takes
away; the executor runs them. Nothing here knows about gRPC, requests or other instances.
"""

from snapshotd.jobs.capture import Capture
from snapshotd.jobs.park import park, resume
from snapshotd.jobs.restore import restore
from snapshotd.jobs.start import start
from snapshotd.jobs.stop import stop

__all__ = ["Capture", "park", "restore", "resume", "start", "stop"]

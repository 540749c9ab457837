"""The jobs of a node: start, capture, restore, park, suspend, resume, stop.

Each is an ordered list of named steps. The list, read from top to bottom, is the job. The executor runs the
steps; a step's ``undo`` removes what the step leaves behind. Nothing here knows of gRPC, requests or other
instances.
"""

from snapshotd.jobs.capture import Capture
from snapshotd.jobs.park import park, resume, suspend
from snapshotd.jobs.restore import restore
from snapshotd.jobs.start import start
from snapshotd.jobs.stop import stop

__all__ = ["Capture", "park", "restore", "resume", "start", "stop", "suspend"]

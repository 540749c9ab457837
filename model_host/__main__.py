"""``python -m model_host``."""

import os
import sys

from model_host.main import main

if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Not sys.exit: a GPU driver that was restored from a snapshot need not survive its own tear-down.
    os._exit(status)

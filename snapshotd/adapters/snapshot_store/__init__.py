"""The node's own snapshots: image files in a directory, plain or encrypted."""

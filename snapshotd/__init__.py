"""snapshotd, the daemon of a node: it runs model hosts, and captures, restores and keeps their snapshots."""

"""The snapshots that this node holds or can fetch, and its uploads."""

"""The snapshots within this node's reach, and the uploads under way."""

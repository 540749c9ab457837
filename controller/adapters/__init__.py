"""The controller's ports on real technology, and in memory."""

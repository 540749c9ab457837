"""CRIU's image files: read, written by a page server, and rewritten so that a restore has less to do."""

# The page server sends this when a dump may begin, or else the reason why it may not.
PAGE_SERVER_READY = b"\1"

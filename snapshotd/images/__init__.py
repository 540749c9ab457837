"""CRIU's image files: what is in them, and what need not be."""

# What a page server says when a dump may begin; anything else is why it may not.
PAGE_SERVER_READY = b"\1"

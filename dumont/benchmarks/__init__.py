"""``dumont bench``: the ways to a first token measured side by side in one run, many callers at once, and the
object store.
"""

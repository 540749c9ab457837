"""From a request to an instance that serves. ``start`` is one start, ``starts`` shares it among requests."""

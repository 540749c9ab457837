"""The command line: parses and prints; what it does is in ``sync``, ``up`` and ``doctor``."""

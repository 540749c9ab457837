"""The command line: parses and prints. ``sync``, ``up``, ``doctor`` and ``benchmarks`` do the work."""

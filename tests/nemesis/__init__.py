"""Kills and stops the processes of a small fleet at random moments, and looks at what became of it.

``python -m tests.nemesis`` runs it; ``scripts/soak`` does so by hand, ``tests/node/test_nemesis.py`` in CI.
``plan`` draws the faults, ``fleet`` runs the processes, ``clients`` ask meanwhile, ``audit`` looks for what
is left, ``run`` puts them together.
"""

"""CRIU's image files: what is in them, and what need not be."""

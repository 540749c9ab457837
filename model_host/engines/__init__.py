"""One inference engine per file."""

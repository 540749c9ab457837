"""The instances of this node: their records, states and journal."""

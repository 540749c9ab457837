"""The GPUs of this node, and what drives them."""

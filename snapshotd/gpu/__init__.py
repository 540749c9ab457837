"""The GPUs of this node: which one an instance goes to, and how others share them."""

"""On real GPUs: run by scripts/gpu-test, deselected elsewhere."""

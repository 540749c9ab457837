"""The frozen thing: one model, one process, one Unix socket, no network."""

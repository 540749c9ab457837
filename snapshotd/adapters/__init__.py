"""The adapters: what the ports of snapshotd and of its repository mean on a real machine."""

"""The shim: one small process for each instance, the parent of its model host.

It has a single thread and does not import gRPC, so that it can fork and use pycriu safely. It outlives
snapshotd, so that a restart of the daemon ends no model host.
"""

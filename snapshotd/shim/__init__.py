"""The shim: one small process per instance, parent of the model host.

It is single-threaded and imports no gRPC, so that forking and pycriu are safe in it, and it
outlives snapshotd, so that a restart of the daemon kills no model.
"""

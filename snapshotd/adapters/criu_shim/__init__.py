"""Model hosts over shim processes, which run CRIU."""

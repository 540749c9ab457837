"""``dumont bench``: how long each way to a first token takes on this machine, side by side in one run; and
what the object store costs."""

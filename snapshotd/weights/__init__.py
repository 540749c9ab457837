"""The weight files of models: their digests, and the memory of the node in which model hosts map them.

A weight file that an instance uses lies in a tmpfs with huge pages, under the digest of its bytes, filled
from the model's directory and shared by all instances. What does not fit is read from its own file.
"""

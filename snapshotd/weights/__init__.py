"""The weight files of models: their digests, and the weight cache in memory from which model hosts map them.

The cache is a tmpfs with huge pages. A file in it is named by the digest of its bytes, copied from the
model's directory, and shared by all instances. A model host maps files that do not fit from the model's
directory.
"""

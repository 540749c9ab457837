"""Objects in a bucket or in a directory, and the keys that protect and sign them."""

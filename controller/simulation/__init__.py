"""A fleet in virtual time: the controller's own code over nodes that take as long as real ones did."""

"""The gRPC servicers: each method parses, calls and converts."""

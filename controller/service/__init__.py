"""The controller's gRPC servicers: parse, call, convert. One file for each service."""

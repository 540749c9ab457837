"""The gRPC services of snapshotd. Each method parses its request, calls the core and converts the result."""

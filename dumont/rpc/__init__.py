"""What the services and the client share about gRPC: errors on the wire, servers, long-running operations."""

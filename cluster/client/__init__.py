"""The gRPC client, for processes with the base install: no Ray, no torch."""

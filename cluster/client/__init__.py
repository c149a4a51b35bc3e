"""The gRPC client: what a process with the base install uses to call a cluster; no ray, no torch."""

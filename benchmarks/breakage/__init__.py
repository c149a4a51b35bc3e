"""What breaks around a cluster, and what must come of it: `python -m benchmarks.breakage`."""

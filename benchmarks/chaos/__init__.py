"""Experiments with faults on a real cluster: swaps under load, killed processes, long runs, a slow expert."""

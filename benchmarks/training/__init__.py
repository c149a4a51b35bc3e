"""Experiments with training on a real Ray: kills, failures, and training beside requests."""

"""Rows to replicas and back: the work of a batch, the choice of replicas, messages, and the answers."""

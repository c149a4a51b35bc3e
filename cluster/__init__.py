"""Processes, durable state, and what clients and operators talk to."""

"""Processes, durable state and the front door."""

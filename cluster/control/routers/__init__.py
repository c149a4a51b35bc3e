"""Routers as members: which are heard, and which are given up."""
